"""Rounds from one command: what each stage hands to the next, for every method."""

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoTokenizer

from llmalign.loop import LoopConfig
from llmalign.loop.rounds import make_run
from llmalign.recipe import load_recipe
from llmalign.scores.sampling import sample_groups
from llmalign.scores.text import sequence_logps
from tests.loop.running import BY_FUNCTION, BY_REWARD, Bench, prompts
from tests.loop.scoring import close, columns, loaded, scored

STAGES = ("sample", "judge", "pair", "cache", "train", "evaluate")
PAIR_COLUMNS = [f"{name}_{side}_logps" for name in ("ref", "last") for side in ("chosen", "rejected")]


def test_a_run_leaves_its_results_and_nothing_else(finished: Bench) -> None:
    """Shards, parts and checkpoints are gone; every stage has its manifest, its plan and its result."""
    output = finished.output
    left = {str(path.relative_to(output)) for path in output.rglob("*") if path.is_dir()}
    assert left == {"round-0", "round-0/evaluate"} | {
        place for n in (1, 2) for place in [f"round-{n}", *(f"round-{n}/{stage}" for stage in STAGES)]
    }
    assert not [path for path in output.rglob("*") if ".tmp" in path.name]
    for name in ("rounds.json", "rounds.png", "loop.json", "comparisons.sqlite"):
        assert (output / name).stat().st_size > 0
    for folder in [
        output / "round-0" / "evaluate",
        *(output / f"round-{n}" / stage for n in (1, 2) for stage in STAGES),
    ]:
        assert {"manifest.json", "plan.json"} < {path.name for path in folder.iterdir()}
    assert (output / "rounds.png").read_bytes()[:4] == b"\x89PNG"
    assert (output / "round-1" / "train" / "curves.png").is_file()


def test_every_round_has_prompts_of_its_own_and_none_of_those_it_is_measured_on(finished: Bench) -> None:
    used = [[row["prompt"] for row in finished.rows(number, "sample", "samples.jsonl")] for number in (1, 2)]
    held = [[row["prompt"] for row in finished.rows(number, "evaluate", "samples.jsonl")] for number in (0, 1, 2)]
    assert held[0] == held[1] == held[2] and list(map(len, used)) == [4, 4]
    assert len({*used[0], *used[1], *held[0]}) == 4 + 4 + 3


def test_samples_are_texts_of_their_tokens(finished: Bench) -> None:
    tokenizer = AutoTokenizer.from_pretrained(finished.model)
    for row in finished.rows(1, "sample", "samples.jsonl"):
        assert row["prompt_ids"] == tokenizer(row["prompt"])["input_ids"]
        assert len(row["completions"]) == len(row["completion_ids"]) == len(row["ended"]) == 4
        for text, ids, ended in zip(row["completions"], row["completion_ids"], row["ended"], strict=True):
            assert text == tokenizer.decode(ids, skip_special_tokens=True) and 1 <= len(ids) <= 6
            assert ended == (ids[-1] == tokenizer.eos_token_id) and (ended or len(ids) == 6)


def test_columns_of_the_second_round_are_log_probs_of_the_start_and_of_the_first_round(finished: Bench) -> None:
    rows = finished.rows(2, "cache", "rows.jsonl")
    start, first = loaded(finished.model), loaded(finished.output / "round-1" / "train")
    close(columns(rows, "ref"), scored(start, rows))
    close(columns(rows, "last"), scored(first, rows))
    assert (columns(rows, "ref") - columns(rows, "last")).abs().min() > 1e-3
    for row, pair in zip(rows, finished.rows(2, "pair", "pairs.jsonl"), strict=True):
        assert {key: value for key, value in row.items() if key not in PAIR_COLUMNS} == pair
    # The first round starts from the reference.
    rows = finished.rows(1, "cache", "rows.jsonl")
    assert torch.equal(columns(rows, "ref"), columns(rows, "last"))
    close(columns(rows, "ref"), scored(start, rows))


def test_the_second_round_samples_from_the_model_of_the_first(finished: Bench) -> None:
    with contextlib.chdir(finished.folder):
        run = make_run(load_recipe(finished.recipe_file, loop=LoopConfig))
        _ = run.tokenizer
    rows, seed = finished.rows(2, "sample", "samples.jsonl"), run.seed(2, "sample")
    for shard in (0, 1):
        own = rows[2 * shard : 2 * shard + 2]
        drawn, from_start = (
            sample_groups(
                loaded(folder), run.tokenizer, [row["prompt_ids"] for row in own], samples=4, max_new_tokens=6,
                seed=run.seed(seed, shard), batch_size=64,
            )
            for folder in (finished.output / "round-1" / "train", finished.model)
        )  # fmt: skip
        assert drawn == [row["completion_ids"] for row in own] != from_start


def test_the_second_round_trains_on_from_the_weights_of_the_first(finished: Bench) -> None:
    """All pairs are one batch, so what is logged at the first step are their mean log-probs before any step."""
    for number in (1, 2):
        rows = finished.rows(number, "cache", "rows.jsonl")
        history = json.loads((finished.output / f"round-{number}" / "train" / "trainer_state.json").read_text())
        first = history["log_history"][0]
        means = columns(rows, "last").mean(dim=0).tolist()
        assert [first["logps/chosen"], first["logps/rejected"]] == pytest.approx(means, abs=1e-4)
        assert first["step"] == 1 and first["drift/chosen"] == pytest.approx(
            (columns(rows, "last") - columns(rows, "ref"))[:, 0].mean().item(), abs=1e-4
        )
    start, *trained = (load_file(folder / "model.safetensors") for folder in models_of(finished, 2))
    for before, after in ((start, trained[0]), (trained[0], trained[1])):
        assert any(not torch.equal(before[name], after[name]) for name in start)


def models_of(bench: Bench, rounds: int) -> list[Path]:
    return [bench.model, *(bench.output / f"round-{number}" / "train" for number in range(1, rounds + 1))]


def test_what_was_measured_is_what_the_stages_hold(finished: Bench) -> None:
    """Length and divergence of the second round, worked out again from its answers and the folders of the models."""
    told = json.loads((finished.output / "rounds.json").read_text())
    assert (told["method"], told["oracle"], [one["round"] for one in told["rounds"]]) == (
        "inpo", "oracle.py:preferred", [0, 1, 2],
    )  # fmt: skip
    assert told["final_model"] == "out/round-2/train"
    rows = finished.rows(2, "evaluate", "samples.jsonl")
    answers = [(row["prompt_ids"], ids) for row in rows for ids in row["completion_ids"]]
    policy, reference = (
        sequence_logps(loaded(folder), answers, pad_token_id=0)
        for folder in (finished.output / "round-2" / "train", finished.model)
    )
    second = told["rounds"][2]
    assert second["kl"]["mean"] == pytest.approx((policy - reference).mean().item(), abs=1e-4)
    assert second["length"]["mean"] == pytest.approx(sum(len(ids) for _, ids in answers) / len(answers))
    assert second["counts"]["sample"]["completions"] == 16 and second["counts"]["train"]["rows"] <= 4
    assert {"against_start", "against_previous", "duality_gap"} < set(second)
    assert "against_start" not in told["rounds"][0] and "kl" not in told["rounds"][0]


def test_pairs_are_the_best_against_the_worst_of_the_oracle(finished: Bench) -> None:
    """The function is transitive, so the tournament must come to its own best and worst."""
    namespace: dict[str, Any] = {}
    exec((finished.folder / "oracle.py").read_text(), namespace)
    for number in (1, 2):
        samples = {row["prompt"]: row for row in finished.rows(number, "sample", "samples.jsonl")}
        pairs = finished.rows(number, "pair", "pairs.jsonl")
        assert pairs
        for row in pairs:
            worth = list(map(namespace["vowels"], samples[row["prompt"]]["completions"]))
            assert namespace["vowels"](row["chosen"]) == max(worth)
            assert namespace["vowels"](row["rejected"]) == min(worth)
            ids = dict(zip(*(samples[row["prompt"]][key] for key in ("completions", "completion_ids")), strict=True))
            assert (row["chosen_ids"], row["rejected_ids"]) == (ids[row["chosen"]], ids[row["rejected"]])


def test_no_comparison_is_asked_twice(finished: Bench) -> None:
    calls = [json.loads(line) for line in (finished.folder / "asked.log").read_text().splitlines()]
    asked = [(prompt, frozenset((a, b))) for _, *given in calls for prompt, a, b in zip(*given, strict=True)]
    assert len(asked) == len(set(asked)) > 0 and all(len(texts) == 2 for _, texts in asked)


RUNS = {
    "dpo": {"method": "pair", "loss": "dpo", "beta": 0.1, **BY_FUNCTION},
    "copg": {"method": "copg", "beta": 0.5, **BY_REWARD},
    "rpo": {"method": "rpo", "beta": 0.1, "eta": 0.1, **BY_REWARD, "select": "best_random", "margin": 0.001},
    "rdpo": {"method": "rdpo", "beta": 0.1, "flip_rate": 0.1, "labels": "sampled", **BY_FUNCTION},
    "ipo": {"method": "pair", "loss": "ipo", "tau": 0.1, "select": "all_pairs", **BY_FUNCTION},
    "online dpo": {"method": "pair", "loss": "dpo", "beta": 0.1, "reference": "previous", **BY_FUNCTION},
    "independent": {"eta": 0.1, "select": "independent", "both_orders": True, "truncated": "keep", **BY_FUNCTION},
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in ("dpo", "copg") else pytest.mark.slow) for name in RUNS]
)
def test_every_method_goes_through_two_rounds(name: str, bench: Bench) -> None:
    keys = RUNS[name]
    small = {"prompts_per_round": 3, "eval_prompts": 1, "eval_samples": 1, "num_train_epochs": 1, "save_steps": 500}
    bench.write(**{"eta": None, "learning_rate": 0.02, **small, **keys})
    told = bench.run()
    assert [one["round"] for one in told["rounds"]] == [0, 1, 2] and told["method"] == keys.get("method", "inpo")
    rows, (start, first, second) = bench.rows(2, "cache", "rows.jsonl"), models_of(bench, 2)
    frozen = loaded(first if keys.get("reference") == "previous" else start)
    if name == "copg":
        expected = [sequence_logps(frozen, [(row["prompt_ids"], ids) for ids in row["completion_ids"]], pad_token_id=0)
                    for row in rows]  # fmt: skip
        close(torch.tensor([row["ref_logps"] for row in rows]), torch.stack(expected))
        worth = {row["prompt"]: row["rewards"] for row in rows}
        assert all(len(rewards) == 4 for rewards in worth.values())
    else:
        close(columns(rows, "ref"), scored(frozen, rows))
        assert ("last_chosen_logps" in rows[0]) == (told["method"] == "inpo")
    assert ("reward" in told["rounds"][0]) == (keys["oracle"] == "reward")
    weights = [load_file(folder / "model.safetensors") for folder in (start, first, second)]
    for before, after in zip(weights, weights[1:], strict=False):
        assert any(not torch.equal(before[key], after[key]) for key in before)


def test_adapters_are_trained_against_their_base(bench: Bench) -> None:
    """Reference: the base without an adapter. Previous iterate: the base with the adapter of the round before."""
    bench.write(use_peft=True, lora_r=4, learning_rate=0.05, eval_prompts=1, eval_samples=1, prompts_per_round=3)
    told = bench.run()
    rows, base = bench.rows(2, "cache", "rows.jsonl"), bench.model
    adapters = [bench.output / f"round-{number}" / "train" for number in (1, 2)]
    assert all((folder / "adapter_model.safetensors").is_file() for folder in adapters)
    assert not (adapters[0] / "model.safetensors").exists()
    close(columns(rows, "ref"), scored(loaded(base), rows))
    previous = PeftModel.from_pretrained(loaded(base), adapters[0]).eval()
    close(columns(rows, "last"), scored(previous, rows))
    assert (columns(rows, "ref") - columns(rows, "last")).abs().min() > 1e-3
    first, second = (load_file(folder / "adapter_model.safetensors") for folder in adapters)
    assert any(not torch.equal(first[name], second[name]) for name in first)
    assert told["rounds"][2]["kl"]["mean"] != 0
    assert all(
        value["mean"] != 0 for value in [json.loads((bench.output / "rounds.json").read_text())["rounds"][2]["kl"]]
    )


def test_conversations_go_through_the_chat_template(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ORACLE_LOG", str(tmp_path / "asked.log"))
    bench.write_prompts(prompts(8, talk=True))
    bench.write(rounds=1, prompts_per_round=3, eval_samples=1)
    bench.run()
    tokenizer = AutoTokenizer.from_pretrained(bench.model)
    for row in bench.rows(1, "sample", "samples.jsonl"):
        (turn,) = row["prompt"]
        assert (
            turn["role"] == "user" and tokenizer.decode(row["prompt_ids"]) == f"<|user|>{turn['content']}<|assistant|>"
        )
    _, asked, *_ = json.loads((tmp_path / "asked.log").read_text().splitlines()[0])
    assert asked[0][0]["role"] == "user"
    close(columns(rows := bench.rows(1, "cache", "rows.jsonl"), "ref"), scored(loaded(bench.model), rows))


def test_columns_of_the_prompts_reach_the_oracle(bench: Bench) -> None:
    (bench.folder / "oracle.py").write_text(
        "def preferred(prompts, first, second, word):\n"
        "    assert all(own in prompt for own, prompt in zip(word, prompts))\n"
        "    return [0.9 if len(a) > len(b) else 0.1 for a, b in zip(first, second)]\n"
    )
    bench.write_prompts([{**row, "word": str(number)} for number, row in enumerate(prompts(5))])
    bench.write(
        rounds=1, prompts_per_round=2, eval_samples=2, eval_prompts=2, num_train_epochs=1, oracle_columns=["word"]
    )
    bench.run()


def test_without_prompts_to_measure_on_nothing_is_measured(bench: Bench) -> None:
    bench.write(rounds=1, prompts_per_round=3, eval_prompts=0)
    told = bench.run()
    assert not (bench.output / "round-0").exists() and not (bench.output / "round-1" / "evaluate").exists()
    assert [set(one) & {"kl", "length", "against_start"} for one in told["rounds"]] == [set(), set()]


def test_prompts_begin_again_on_request_alone(bench: Bench) -> None:
    """Of five prompts one is held out: three rounds of three take four, and four again, and the first once more."""
    bench.write_prompts(prompts(5))
    bench.write(rounds=3, prompts_per_round=3, eval_prompts=1, reuse_prompts=True)
    with contextlib.chdir(bench.folder):
        run = make_run(load_recipe(bench.recipe_file, loop=LoopConfig))
        used = [row["row_id"] for number in (1, 2, 3) for row in run.round_prompts(number)]
        (held,) = run.eval_prompts()
    assert used[:4] == used[4:8] and used[8] == used[0] and {*used, held["row_id"]} == set(range(5))
    assert [row["place"] for row in run.round_prompts(2)] == [0, 1, 2]


def test_checkpoints_of_finished_rounds_stay_on_request(bench: Bench) -> None:
    bench.write(rounds=1, eval_prompts=0, prompts_per_round=4, keep_checkpoints=True, save_steps=1)
    bench.run()
    kept = {path.name for path in (bench.output / "round-1" / "train").glob("checkpoint-*")}
    assert len(kept) >= 2
    bench.write(rounds=1, eval_prompts=0, prompts_per_round=4, save_steps=1)
    bench.run()
    assert not list((bench.output / "round-1" / "train").glob("checkpoint-*"))
