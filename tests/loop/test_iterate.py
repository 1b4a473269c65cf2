"""Rounds from one command: what each stage hands to the next, what is found again, what is refused."""

import contextlib
import fcntl
import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from llmalign.cli import main
from llmalign.loop import LoopConfig
from llmalign.loop.iterate import make_run
from llmalign.loop.stages import describe
from llmalign.recipe import load_recipe
from llmalign.scores.sampling import sample_groups
from llmalign.scores.text import sequence_logps
from tests.loop.running import BY_FUNCTION, BY_REWARD, Bench, everything, prompts, results

#: all pairs of a round in one step, whose numbers are logged
ONE_BATCH = {"learning_rate": 0.01, "per_device_train_batch_size": 4, "logging_steps": 1}
JUDGE = {"oracle": "judge", "judge_url": "http://127.0.0.1:9/v1", "judge_model": "m"}
STAGES = ("sample", "judge", "pair", "cache", "train", "evaluate")
PAIR_COLUMNS = [f"{name}_{side}_logps" for name in ("ref", "last") for side in ("chosen", "rejected")]


@pytest.fixture(scope="module")
def finished(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Bench:
    """A run of two rounds that is over; tests look at it and change nothing."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("finished")
        patch.setenv("ORACLE_LOG", str(folder / "asked.log"))
        bench = Bench(folder, tiny_model_dir)
        bench.write(**ONE_BATCH)
        assert bench.iterate() == 0
        return bench


@pytest.fixture
def again(finished: Bench, tmp_path: Path, plain: None) -> Bench:
    """A copy of the finished run, to be spoilt and gone on from."""
    bench = Bench(tmp_path / "again", finished.model)
    shutil.copytree(finished.output, bench.output)
    bench.write(**ONE_BATCH)
    return bench


def loaded(folder: Path | str) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def scored(model: Any, rows: list[dict], names: tuple[str, ...] = ("chosen_ids", "rejected_ids")) -> torch.Tensor:
    """Log-probs (rows, names), computed one by one."""
    sequences = [(row["prompt_ids"], row[name]) for row in rows for name in names]
    return sequence_logps(model, sequences, pad_token_id=0, batch_size=1).reshape(len(rows), -1)


def columns(rows: list[dict], name: str) -> torch.Tensor:
    return torch.tensor([[row[f"{name}_{side}_logps"] for side in ("chosen", "rejected")] for row in rows])


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


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


def test_a_finished_run_is_found_and_no_byte_changes(
    again: Bench, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    before = everything(again.output)
    monkeypatch.setenv("ORACLE_LOG", str(again.folder / "asked.log"))
    with caplog.at_level(logging.INFO, logger="llmalign"):
        assert again.iterate() == 0
    done = [record.getMessage() for record in caplog.records if record.getMessage().endswith("done already.")]
    assert len(done) == 1 + 2 * len(STAGES) and not any("..." in record.getMessage() for record in caplog.records)
    assert not (again.folder / "asked.log").exists()
    assert everything(again.output) == before


@pytest.mark.parametrize(
    ("keys", "named"),
    [
        ({"eta": 0.2}, "eta 0.1 -> 0.2"),
        ({"temperature": 0.9}, "temperature 1.0 -> 0.9"),
        ({"samples_per_prompt": 6}, "samples_per_prompt 4 -> 6"),
        ({"learning_rate": 0.02}, "learning_rate 0.01 -> 0.02"),
        ({"select": "independent"}, "select 'best_worst' -> 'independent'"),
        ({"seed": 7}, "seed 42 -> 7"),
        ({"preference_function": "oracle.py:sometimes"}, "preference_function 'oracle.py:preferred' ->"),
        ({"eval_prompts": 2}, "eval_prompts 3 -> 2"),
    ],
)  # fmt: skip
def test_another_recipe_is_refused_with_key_and_values(
    keys: dict[str, Any], named: str, again: Bench, capsys: pytest.CaptureFixture[str]
) -> None:
    before = everything(again.output)
    again.write(**{**ONE_BATCH, **keys})
    assert again.iterate() == 2
    said = capsys.readouterr().err
    assert "The run in out was started with another recipe (" in said and named in said
    assert "Traceback" not in said and everything(again.output) == before


@pytest.mark.parametrize("changed", ["oracle", "prompts", "model"])
def test_what_the_recipe_names_may_not_change_either(
    changed: str, again: Bench, capsys: pytest.CaptureFixture[str]
) -> None:
    """Another version of the function, other prompts in the file, other weights in the folder."""
    before = everything(again.output)
    if changed == "oracle":
        path = again.folder / "oracle.py"
        path.write_text(path.read_text().replace("0.9 if gap", "0.8 if gap"))
    elif changed == "prompts":
        again.write_prompts(prompts(13))
    else:
        path = again.model / "model.safetensors"
        path.write_bytes(path.read_bytes()[:-4] + b"\0\0\0\x40")  # the last number, as 2.0
    assert again.iterate() == 2
    said = capsys.readouterr().err
    assert ("was judged by another oracle" if changed == "oracle" else "was started with another recipe") in said
    assert everything(again.output) == before


def test_rounds_can_be_added_and_old_weights_pruned(finished: Bench, bench: Bench) -> None:
    """One round, then a second one: the bytes of two rounds at once, but for the weights that the recipe gives up."""
    bench.write(**ONE_BATCH, rounds=1, keep_rounds=1)
    bench.run()
    assert (bench.output / "round-1" / "train" / "model.safetensors").is_file(), "the last model was given up"
    bench.write(**ONE_BATCH, rounds=2, keep_rounds=1)
    bench.run()
    whole, grown = results(finished.output), results(bench.output)
    del whole["round-1/train/model.safetensors"]
    assert grown == whole
    assert bench.manifest(1, "train")["pruned"] == ["model.safetensors"]
    assert bench.manifest(2, "train")["pruned"] == []
    before = everything(bench.output)
    bench.run()  # finished: what was given up is not missed
    assert everything(bench.output) == before


@pytest.mark.slow
def test_a_pruned_run_goes_on_with_more_rounds(again: Bench) -> None:
    """The third round starts from the second one's weights, its reference is the start: neither is ever given up."""
    again.write_prompts(prompts(15))
    again.output = again.folder / "fresh"
    again.write(**ONE_BATCH, rounds=2, keep_rounds=1)
    again.run()
    again.write(**ONE_BATCH, rounds=3, keep_rounds=2)
    again.run()
    models = [path.parent.parent.name for path in sorted(again.output.glob("round-*/train/model.safetensors"))]
    assert models == ["round-2", "round-3"]
    rows = again.rows(3, "cache", "rows.jsonl")
    close(columns(rows, "ref"), scored(loaded(again.model), rows))
    close(columns(rows, "last"), scored(loaded(again.output / "round-2" / "train"), rows))


def test_prompts_shared_out_among_all_rounds_hold_their_number(
    bench: Bench, capsys: pytest.CaptureFixture[str]
) -> None:
    """With prompts_per_round left open, more rounds would give the finished ones other prompts."""
    bench.write(prompts_per_round=None, preference_function="oracle.py:short")
    assert bench.iterate() == 2  # begun, and stopped by its oracle
    before = everything(bench.output)
    bench.write(prompts_per_round=None, preference_function="oracle.py:short", rounds=3)
    assert bench.iterate() == 2
    assert "rounds 2 -> 3" in capsys.readouterr().err and everything(bench.output) == before


@pytest.mark.parametrize(
    ("place", "redone"),
    [
        ("round-1/judge/judged.jsonl", ["round-1/judge"]),
        ("round-2/sample/samples.jsonl", ["round-2/sample"]),
        ("round-0/evaluate/samples.jsonl", ["round-0/evaluate"]),
    ],
)
def test_a_result_edited_by_hand_is_made_again_and_said(
    place: str, redone: list[str], again: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    """What comes out is the same as before, so what was made of it still stands."""
    before = results(again.output)
    path = again.output / place
    path.write_bytes(path.read_bytes()[:-2] + b"  ")
    with caplog.at_level(logging.INFO, logger="llmalign"):
        assert again.iterate() == 0
    assert f"out/{place} has changed since it was written: the stage is done again." in caplog.text
    said = [record.getMessage() for record in caplog.records]
    assert [text.removesuffix(" ...") for text in said if text.endswith(" ...")] == redone
    assert results(again.output) == before


def test_a_model_is_never_thrown_away(again: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    """Half of the first round's pairs taken out, its manifest put right: what was trained is of other rows, and stays.

    Neither is a model that was edited trained again, unless its folder is deleted.
    """
    folder, weights = again.output / "round-1" / "pair", again.output / "round-1" / "train" / "model.safetensors"
    rows = (folder / "pairs.jsonl").read_bytes().splitlines(keepends=True)
    whole, trained = b"".join(rows), weights.read_bytes()
    manifest = json.loads((folder / "manifest.json").read_text())
    for content in (b"".join(rows[:1]), whole):
        (folder / "pairs.jsonl").write_bytes(content)
        manifest["outputs"]["pairs.jsonl"] = describe(folder / "pairs.jsonl")
        (folder / "manifest.json").write_text(json.dumps(manifest))
        if content is not whole:
            assert again.iterate() == 2
            assert "out/round-1/train holds a trained model that is not what its manifest" in capsys.readouterr().err
            assert weights.read_bytes() == trained
    before = results(again.output)
    assert again.iterate() == 0 and results(again.output).keys() >= before.keys()
    weights.write_bytes(trained[:-2] + b"  ")
    assert again.iterate() == 2
    assert "or delete the folder to have it trained again" in capsys.readouterr().err
    shutil.rmtree(weights.parent)
    assert again.iterate() == 0 and weights.read_bytes() == trained


def test_weights_that_were_pruned_and_are_needed_again_are_asked_for(
    again: Bench, capsys: pytest.CaptureFixture[str]
) -> None:
    """The second round's samples are spoilt, and the model that they come from is gone: said, or made again."""
    again.write(**ONE_BATCH, keep_rounds=1)
    assert again.iterate() == 0 and not (again.output / "round-1" / "train" / "model.safetensors").exists()
    before = results(again.output)
    (again.output / "round-2" / "sample" / "samples.jsonl").write_text("spoilt\n")
    status = again.iterate()
    if status == 0:
        assert results(again.output) == before
    else:
        said = capsys.readouterr().err
        assert status == 2 and "Traceback" not in said and "round-1" in said
        assert "pruned" in said or "keep_rounds" in said, said


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


def test_two_processes_do_not_share_a_folder(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    bench.output.mkdir()
    with (bench.output / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert bench.iterate() == 2
    assert "another process works in out; wait for it" in capsys.readouterr().err
    assert [path.name for path in bench.output.iterdir()] == [".lock"]


def test_another_run_s_folder_is_refused(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    (bench.output / "checkpoint-3").mkdir(parents=True)
    assert bench.iterate() == 2
    assert "holds another run (checkpoint-3)" in capsys.readouterr().err
    assert not (bench.output / "loop.json").exists()


def test_a_file_where_the_folder_should_be_is_refused(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    bench.output.write_text("notes")
    assert bench.iterate() == 2
    said = capsys.readouterr().err
    assert (
        "out" in said
        and said.count("llmalign: ") == 1
        and "Traceback" not in said
        and bench.output.read_text() == "notes"
    )


def test_a_recipe_of_one_kind_is_not_run_as_the_other(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(bench.recipe_file)
    assert main(["train", path]) == 2
    assert f"names an oracle, so it is a recipe of several rounds: llmalign iterate {path}" in capsys.readouterr().err
    assert main(["iterate", "trainers/inpo/smoke.yaml"]) == 2
    assert "the recipe names no oracle: set oracle to one of preference_function," in capsys.readouterr().err


@pytest.mark.parametrize(
    ("keys", "sentence"),
    [
        ({"preference_function": "oracle.py:absent"}, "has no 'absent'"),
        ({"preference_function": "absent.py:preferred"}, "there is no file absent.py"),
        ({"preference_function": "nowhere.module:preferred"}, "there is no module 'nowhere.module'"),
        ({"preference_function": "math:dist"}, "math:dist"),
        ({"preference_function": "oracle.py:raises"}, "oracle.py:raises"),
        ({"preference_function": "oracle.py:short"}, "oracle.py:short gave 1 numbers for"),
        ({"preference_function": "oracle.py:beyond"}, "gave 1.5 for pair 0 of its call; P must lie in [0, 1]"),
        ({"oracle": "reward", "reward_funcs": ["oracle.py:raises"]}, "put the oracle right, and start"),
        ({"oracle": "preference_model", "preference_model": "/absent/model"}, "/absent/model"),
        ({"oracle": "reward", "reward_models": ["/absent/model"]}, "/absent/model"),
        ({"model_name_or_path": "/absent/model"}, "/absent/model"),
        ({"dataset_name": "/absent/prompts.jsonl"}, "/absent/prompts.jsonl"),
        ({"oracle_columns": ["word"]}, "word"),
        ({"max_length": 10}, "there are 0 prompts that fit"),
        ({"method": "dpo", "eta": None}, "use method: pair with loss: dpo"),
        ({**JUDGE, "judge_url": "localhost:8000"}, "http://"),
        ({**JUDGE, "judge_template": "no.txt"}, "no.txt"),
    ],
)  # fmt: skip
def test_bad_input_ends_with_one_sentence(
    keys: dict[str, Any], sentence: str, bench: Bench, capsys: pytest.CaptureFixture[str]
) -> None:
    bench.write(**{"eval_samples": 1, **keys})
    assert bench.iterate() == 2
    said = capsys.readouterr().err
    assert sentence in said and said.count("llmalign: ") == 1 and "Traceback" not in said


@pytest.mark.parametrize(
    "keys",
    [
        {"preference_function": "oracle.py:absent"},
        {"oracle": "preference_model", "preference_model": "/absent/model"},
        {"oracle": "reward", "reward_models": ["/absent/model"]},
        {**JUDGE, "judge_url": "localhost:8000"},
        {"model_name_or_path": "/absent/model"},
    ],
)
def test_what_is_not_there_is_found_before_anything_is_written(keys: dict[str, Any], bench: Bench) -> None:
    bench.write(**keys)
    assert bench.iterate() == 2
    assert not bench.output.exists() or not any(bench.output.iterdir())


def test_an_oracle_that_is_put_right_is_gone_on_with(
    bench: Bench, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A function that fails stops the run; mended, the same command goes on, and nothing else was lost."""
    path = bench.folder / "oracle.py"
    good = path.read_text()
    path.write_text(good.replace("0.9 if gap", "1.9 if gap"))
    bench.write(rounds=1, prompts_per_round=3)
    assert bench.iterate() == 2
    assert "P must lie in [0, 1]" in capsys.readouterr().err
    path.write_text(good)
    # A module that was imported is kept by the process, as no second command would.
    import sys

    for name in [name for name in sys.modules if name.startswith("llmalign_reward_oracle")]:
        del sys.modules[name]
    bench.run()


def test_an_oracle_that_cannot_judge_everything_goes_through(bench: Bench) -> None:
    """NaN for some pairs: they are left out and counted, in training, in win rates and in the gap."""
    bench.write(
        rounds=1, prompts_per_round=4, preference_function="oracle.py:sometimes", select="all_pairs", max_failed=0.9
    )
    told = bench.run()
    assert told["rounds"][1]["counts"]["judge"]["failed"] > 0
