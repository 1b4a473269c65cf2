"""The quickstart from end to end: shrunk in the quick suite, in full among the slow tests."""

import contextlib
import io
import json
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from llmalign import embedded as world
from llmalign.quickstart import NEXT_COMMAND, Answers, Settings, main, measure

SHRUNK = Settings(
    sft_steps=4,
    sft_batch=4,
    pairs=16,
    held_out_pairs=8,
    curve_pairs=6,
    pair_steps=3,
    pair_batch=4,
    prompts=6,
    answers=2,
    new_tokens=12,
)


@pytest.fixture(scope="module")
def shrunk(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict, str]:
    folder = tmp_path_factory.mktemp("quickstart") / "run"
    screen = io.StringIO()
    with contextlib.redirect_stdout(screen):
        results = main(folder, seed=3, settings=SHRUNK)
    return folder, results, screen.getvalue()


def test_it_leaves_models_numbers_answers_and_a_picture(shrunk: tuple[Path, dict, str]) -> None:
    folder, results, _ = shrunk
    assert json.loads((folder / "results.json").read_text()) == results
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")
    weights = {}
    for name in ("sft", "rpo", "dpo"):
        weights[name] = AutoModelForCausalLM.from_pretrained(folder / name).state_dict()["lm_head.weight"]
        assert len(AutoTokenizer.from_pretrained(folder / name)) == len(weights[name])
    assert not weights["rpo"].equal(weights["sft"]) and not weights["rpo"].equal(weights["dpo"])
    answers = [json.loads(line) for line in (folder / "answers.jsonl").read_text().splitlines()]
    assert len(answers) == 3 * SHRUNK.prompts * SHRUNK.answers
    assert all(row["score"] == world.score(row["prompt"], row["answer"]) for row in answers)


def test_both_methods_start_from_the_same_model(shrunk: tuple[Path, dict, str]) -> None:
    histories = shrunk[1]["histories"]
    first = {name: next(entry for entry in histories[name] if "eval_loss" in entry) for name in ("rpo", "dpo")}
    for entry in first.values():
        assert entry["step"] == 0 and entry["eval_drift/chosen"] == pytest.approx(0, abs=1e-4)
    assert first["rpo"]["eval_logps/chosen"] == pytest.approx(first["dpo"]["eval_logps/chosen"], abs=1e-4)


def test_the_screen_ends_with_the_command_for_a_real_model(shrunk: tuple[Path, dict, str]) -> None:
    screen = shrunk[2]
    assert screen.rstrip().splitlines()[-1].strip() == NEXT_COMMAND
    for words in ("win rate", "like length", "pair accuracy", "chosen drift", "KL", "words an answer", "broken"):
        assert words in screen, words
    assert screen.count("RPO: [") == screen.count("SFT: [") == 3


def test_the_next_command_names_a_shipped_recipe(repository: Path) -> None:
    words = NEXT_COMMAND.split()
    assert words[:2] == ["llmalign", "train"]
    assert (repository / words[2]).is_file()


def test_measured_numbers_by_hand() -> None:
    import torch

    prompt = "Recommend the salt mine to a school class.\n"
    good = "I would send a school class to the salt mine because the walls sparkle like sugar."  # 3 points, 16 words
    fair = "The salt mine is all right."  # 1 point, 6 words
    broken = "The salt mine is all right. Salt the mine."  # .25 points, 9 words
    own, start = Answers([prompt] * 2, [good, broken]), Answers([prompt] * 2, [fair, fair])
    logps = [(torch.tensor([-9.0, -11.0]), torch.tensor([-12.0, -10.0]))]
    start_logps = [(torch.tensor([-8.0, -13.0]), torch.tensor([-12.0, -11.0]))]
    found = measure(own, start, logps + start_logps, ["a", "b"], world_kl())
    assert found.score.mean == pytest.approx((3 + 0.25) / 2)
    assert found.words.mean == pytest.approx((16 + 9) / 2)
    assert found.broken.mean == pytest.approx(0.25)
    assert found.logp_accuracy.mean == 0.5
    # margins against the start: (-1) > 0 is false, 2 > 1 is true
    assert found.margin_accuracy is not None and found.margin_accuracy.mean == 0.5
    assert found.chosen_drift is not None and found.chosen_drift.mean == pytest.approx(0.5)
    assert found.win_rate is not None and (found.win_rate.wins, found.win_rate.losses) == (2, 2)
    assert found.matched_win_rate is not None and found.matched_win_rate.n == 0


def world_kl():
    from llmalign.evaluation import bootstrap_mean

    return bootstrap_mean([0.5, 1.5])


@pytest.mark.slow
def test_rpo_wins_against_sft_with_its_whole_interval(tmp_path: Path) -> None:
    results = main(tmp_path / "full", seed=0)["models"]
    assert results["rpo"]["win_rate"]["low"] > 0.5
    assert results["rpo"]["matched_win_rate"]["low"] > 0.5
    assert results["rpo"]["margin_accuracy"]["mean"] > 0.75
