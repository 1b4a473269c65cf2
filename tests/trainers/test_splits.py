"""Going on with another number of processes: the same rows in every step and the same weights, or a refusal."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file
from torch import nn

from llmalign import (
    CoPGConfig,
    CoPGTrainer,
    RewardConfig,
    RewardTrainer,
    RPOConfig,
    RPOTrainer,
    SFTConfig,
    SFTTrainer,
)
from llmalign.diffusion.denoiser import LORA_FILE
from llmalign.diffusion.tiny import build_tiny
from llmalign.errors import UserError
from llmalign.processes import end_processes, load_group_users
from llmalign.trainers.manifest import files_of, read_manifest, write_manifest
from llmalign.trainers.run_folder import compare_recipes, record_run
from llmalign.trainers.splits import check_split, dropout_of
from tests.diffusion.training import pairs
from tests.diffusion.training import trainer as image_trainer
from tests.trainers import tiny
from tests.trainers.forked import on_one, on_two
from tests.trainers.toy_runs import make

STEPS = 6
MIDDLE = "checkpoint-3"  # in the middle of the second epoch


def texts(count: int) -> Any:
    return tiny.pairs(count).map(lambda row: {"text": row["prompt"] + row["chosen"]}).select_columns(["text"])


# Seven rows in steps of four: an epoch's last step has three. TRL's own trainers count a row that fills it up, so they
# get eight.
CASES: dict[str, tuple[Any, Any, Any, int, dict[str, Any]]] = {
    "rpo": (RPOTrainer, RPOConfig, tiny.pairs, 7, {"alarm_prompts": 0}),
    "rpo-tokens": (RPOTrainer, RPOConfig, tiny.pairs, 7, {"alarm_prompts": 0, "tokens_per_batch": 120}),
    "rpo-lora": (RPOTrainer, RPOConfig, tiny.pairs, 7, {"alarm_prompts": 0, "peft": True}),
    "copg": (CoPGTrainer, CoPGConfig, tiny.groups, 7, {"alarm_prompts": 0}),
    "sft": (SFTTrainer, SFTConfig, texts, 8, {}),
    "reward": (RewardTrainer, RewardConfig, tiny.pairs, 8, {}),
}


def built(case: str, model: str, folder: Path, processes: int, **options: Any) -> Any:
    trainer, config, rows, count, own = CASES[case]
    own = {**own, **options}
    peft = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM") if own.pop("peft", False) else None
    seen: list[tuple[int, list[str]]] = []

    class Watched(trainer):
        """Writes down what each step is made of, by the tokens of its rows."""

        def training_step(self, network: nn.Module, inputs: dict[str, Any], *rest: Any) -> Any:
            held = inputs["row_id"] if "row_id" in inputs else inputs["input_ids"].sort(dim=1).values
            kept = inputs.get("filler", torch.zeros(len(held), dtype=torch.bool))
            whole = [row for row, filler in zip(held.tolist(), kept.tolist(), strict=True) if not filler]
            padded = [[token for token in row if token] if isinstance(row, list) else row for row in whole]
            seen.append((self.state.global_step, [json.dumps(row) for row in padded]))
            return super().training_step(network, inputs, *rest)

    common = {
        "output_dir": str(folder), "use_cpu": True, "per_device_train_batch_size": 4 // processes, "max_steps": STEPS,
        "learning_rate": 1e-3, "logging_steps": 1, "save_steps": 1, "report_to": "none", "disable_tqdm": True,
        "max_length": 64,
    }  # fmt: skip
    args = config(**{**common, **own})
    made = Watched(
        model=model, args=args, train_dataset=rows(count), processing_class=tiny.tokenizer(), peft_config=peft
    )
    made.seen = seen
    return made


def trained(case: str, model: str, folder: Path, checkpoint: str | None) -> None:
    """Train to the end, as one of the processes that there are."""
    processes, rank = int(os.environ.get("WORLD_SIZE", "1")), os.environ.get("RANK", "0")
    if processes > 1:
        load_group_users()
    run = built(case, model, folder, processes)
    assert run.args.world_size == processes
    run.train(resume_from_checkpoint=checkpoint)
    (folder / f"seen-{rank}.json").write_text(json.dumps(run.seen))
    del run
    if processes > 1:
        end_processes(together=True)


def steps_of(folder: Path) -> dict[int, list[str]]:
    """The rows of each step, of all processes together."""
    found: dict[int, list[str]] = {}
    for file in folder.glob("seen-*.json"):
        for step, rows in json.loads(file.read_text()):
            found[step] = sorted([*found.get(step, []), *rows])
    return found


def losses_of(folder: Path) -> dict[int, float]:
    log = json.loads((folder / f"checkpoint-{STEPS}" / "trainer_state.json").read_text())["log_history"]
    return {entry["step"]: entry["loss"] for entry in log if "loss" in entry}


@pytest.mark.parametrize(
    "case, first, then",
    [
        ("rpo", 2, 1),
        *(pytest.param(case, 2, 1, marks=pytest.mark.slow) for case in CASES if case != "rpo"),
        *(pytest.param(case, 1, 2, marks=pytest.mark.slow) for case in CASES),
    ],
)
def test_the_run_goes_on_with_the_same_rows_to_the_same_weights(
    case: str, first: int, then: int, tmp_path: Path
) -> None:
    model, whole, other = tiny.save(tmp_path / "start"), tmp_path / "whole", tmp_path / "other"
    on = {1: on_one, 2: on_two}
    on[first](tmp_path / "log", trained, case, model, whole, None)
    on[then](tmp_path / "log", trained, case, model, other, str(whole / MIDDLE))
    log = (tmp_path / "log").read_text()
    assert f"written by {first} process(es) with {4 // first} rows at a time and this run has {then} with" in log
    assert log.count("each step has the rows that it would have had") == 1, "of several processes one says it"
    rows, gone_on = steps_of(whole), steps_of(other)
    assert set(rows) == set(range(STEPS)) and gone_on == {step: rows[step] for step in (3, 4, 5)}
    assert losses_of(other) == pytest.approx(losses_of(whole), rel=1e-5, abs=1e-5)
    file = "adapter_model.safetensors" if case.endswith("lora") else "model.safetensors"
    ended, began = (load_file(whole / step / file) for step in (f"checkpoint-{STEPS}", MIDDLE))
    found = load_file(other / f"checkpoint-{STEPS}" / file)
    assert found.keys() == ended.keys()
    for name, weight in ended.items():
        torch.testing.assert_close(found[name], weight, rtol=1e-5, atol=1e-5, msg=name)
    assert max((ended[name] - began[name]).abs().max() for name in ended) > 5e-4


def images_trained(folder: Path, checkpoint: str | None) -> None:
    """Seven pairs in steps of four with every draw in use, as one of the processes that there are."""
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if processes > 1:
        load_group_users()
    run = image_trainer(
        build_tiny("sd"), folder, rows=pairs(7), per_device_train_batch_size=4 // processes, max_steps=STEPS,
        save_strategy="steps", save_steps=1, caption_dropout=0.3, random_flip="image", output_dir=str(folder),
        beta=200.0,  # the default multiplies roundings by thousands
    )  # fmt: skip
    run.train(resume_from_checkpoint=checkpoint)
    del run
    if processes > 1:
        end_processes(together=True)


@pytest.mark.slow
@pytest.mark.parametrize("first, then", [(2, 1), (1, 2)])
def test_a_run_on_images_goes_on_to_the_same_weights(first: int, then: int, tmp_path: Path) -> None:
    whole, other, on = tmp_path / "whole", tmp_path / "other", {1: on_one, 2: on_two}
    on[first](tmp_path / "log", images_trained, whole, None)
    on[then](tmp_path / "log", images_trained, other, str(whole / MIDDLE))
    assert losses_of(other) == pytest.approx(losses_of(whole), rel=1e-5, abs=1e-5)
    ended, began = (load_file(whole / step / LORA_FILE) for step in (f"checkpoint-{STEPS}", MIDDLE))
    found = load_file(other / f"checkpoint-{STEPS}" / LORA_FILE)
    for name, weight in ended.items():
        torch.testing.assert_close(found[name], weight, rtol=1e-5, atol=1e-5, msg=name)
    assert max((ended[name] - began[name]).abs().max() for name in ended) > 5e-4


# Refusals


def of_two(folder: Path, **about: Any) -> Path:
    """A checkpoint whose manifest and random states are those of two processes, with two rows each."""
    (folder / "rng_state.pth").rename(folder / "rng_state_0.pth")
    (folder / "rng_state_1.pth").write_bytes((folder / "rng_state_0.pth").read_bytes())
    state = json.loads((folder / "trainer_state.json").read_text())
    (folder / "trainer_state.json").write_text(json.dumps({**state, "train_batch_size": 2}))
    write_manifest(folder, files_of(folder), **{"step": 3, "processes": 2, "rows_per_step": 4, **about})
    return folder


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny.save(tmp_path_factory.mktemp("start"))


@pytest.fixture(scope="module")
def checkpoint(start: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    built("reward", start, folder, 1, max_steps=3).train()
    return of_two(folder / MIDDLE)


@pytest.mark.parametrize(
    "case, options, said",
    [
        ("reward", {"per_device_train_batch_size": 8}, "4 rows a step on 2 process.* this one takes 8 on 1"),
        ("reward", {"disable_dropout": False}, None),
        ("reward", {"train_sampling_strategy": "group_by_length"}, "group_by_length sorts by the batch of one process"),
        ("sft", {"neftune_noise_alpha": 5.0}, "neftune_noise_alpha draws noise"),
        ("rpo", {"accelerator_config": {"use_seedable_sampler": False}}, "accelerator_config deals rows out"),
        ("rpo", {"dataloader_drop_last": True}, None),
        ("rpo", {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2, "dataloader_drop_last": True},
         "dataloader_drop_last would drop other rows"),
    ],
)  # fmt: skip
def test_what_another_split_would_change_is_refused(
    case: str, options: dict[str, Any], said: str | None, start: str, checkpoint: Path, tmp_path: Path
) -> None:
    run = built(case, start, tmp_path, 1, **options)
    if said is None:
        check_split(run, checkpoint)
        return
    with pytest.raises(UserError, match=said):
        check_split(run, checkpoint)


def test_rows_that_fill_up_a_batch_and_dropout_are_refused_where_they_count(
    start: str, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(CASES, "odd", (*CASES["reward"][:3], 7, {}))
    with pytest.raises(UserError, match="the 7 rows are no multiple of the 4 .* repeating rows: take 2 process"):
        check_split(built("odd", start, tmp_path, 1), checkpoint)
    monkeypatch.setitem(CASES, "dropping", (*CASES["sft"][:4], {"peft": True}))
    adapted = built("dropping", start, tmp_path, 1)
    assert dropout_of(adapted.model) is None
    check_split(adapted, checkpoint)
    layer = next(module for module in adapted.model.modules() if isinstance(module, nn.Dropout | nn.Identity))
    assert isinstance(layer, nn.Identity)
    own = make(tmp_path / "toy", per_device_train_batch_size=4)  # whose attention drops a share of 0.2
    with pytest.raises(UserError, match=r"because dropout \(model.layers.0.self_attn.attention_dropout\) draws random"):
        check_split(own, checkpoint)


def test_other_micro_batches_on_as_many_processes_are_looked_at_alike(
    start: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    halves = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    monkeypatch.setitem(CASES, "odd", (*CASES["reward"][:3], 7, {}))
    built("odd", start, tmp_path / "run", 1, max_steps=3).train()
    kept = tmp_path / "run" / MIDDLE
    check_split(built("odd", start, tmp_path / "same", 1), kept)
    check_split(built("reward", start, tmp_path / "eight", 1, **halves), kept)
    with pytest.raises(UserError, match="the 7 rows are no multiple .*: 4$"):
        check_split(built("odd", start, tmp_path / "halves", 1, **halves), kept)
    toy = make(tmp_path / "toy", max_steps=2, per_device_train_batch_size=4)  # with dropout
    toy.train()
    with pytest.raises(UserError, match="1 process.* with 4 rows at a time and this run has 1 with 2, .* dropout"):
        check_split(make(tmp_path / "other", **halves), tmp_path / "toy" / "checkpoint-2")


def test_an_optimizer_of_another_engine_is_not_passed_over(start: str, tmp_path: Path) -> None:
    """The Trainer itself goes on without it, and from the first learning rate."""
    run = built("reward", start, tmp_path / "run", 1, max_steps=3)
    run.train()
    kept = tmp_path / "run" / MIDDLE
    assert read_manifest(kept).engine == "copies"
    check_split(run, kept)
    about = {"step": 3, "processes": 1, "rows_per_step": 4}
    write_manifest(kept, files_of(kept), **about, engine="zero3")
    with pytest.raises(UserError, match="as zero3 keeps it, .* one process or DDP, .* with --accelerate zero3"):
        check_split(run, kept)
    for mark, name in (("global_step3", "ZeRO"), ("pytorch_model_fsdp_0", "FSDP")):
        (kept / mark).mkdir()
        write_manifest(kept, files_of(kept), **about)
        with pytest.raises(UserError, match=f"as {name} keeps it, and this run is under one process"):
            check_split(run, kept)
        (kept / mark).rmdir()


def test_recipes_may_share_out_their_rows_anew_and_not_take_others(tmp_path: Path) -> None:
    keys = ("world_size", "per_device_train_batch_size", "gradient_accumulation_steps")

    def recipe(*sizes: int, **rest: Any) -> dict[str, Any]:
        return {"method": "rpo", **dict(zip(keys, sizes, strict=True)), **rest}

    record_run(tmp_path, recipe(2, 4, 1))
    file = tmp_path / "run.json"
    for split in ((1, 8, 1), (1, 2, 4), (4, 1, 2), (2, 2, 2)):
        compare_recipes(file, recipe(*split), frozenset(), any_split=True)
    with pytest.raises(UserError, match=r"takes 8 rows a step \(2 process\(es\) x 4 x 1 .* this recipe 4 \(1 process"):
        compare_recipes(file, recipe(1, 4, 1), frozenset(), any_split=True)
    with pytest.raises(UserError, match="beta None -> 0.2"):
        compare_recipes(file, recipe(1, 8, 1, beta=0.2), frozenset(), any_split=True)
    with pytest.raises(UserError, match="per_device_train_batch_size 4 -> 8, world_size 2 -> 1"):
        compare_recipes(file, recipe(1, 8, 1), frozenset())
