"""A short run of each kind of trainer, that saves at every step and goes on from what it finds; nothing is launched."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from llmalign import CoPGConfig, CoPGTrainer, RPOConfig, RPOTrainer, SFTConfig, SFTTrainer
from llmalign.diffusion.tiny import build_tiny
from tests.diffusion.training import pairs
from tests.diffusion.training import trainer as image_trainer
from tests.trainers import sampled_runs, tiny
from tests.trainers.building import LORA, build

STEPS = 6
SAVING = {"max_steps": STEPS, "save_strategy": "steps", "save_steps": 1, "save_total_limit": 2}


def _pairs(folder: Path, **options: Any) -> Any:
    return build(RPOTrainer, RPOConfig, tiny.model(), folder, data=tiny.pairs(7), **SAVING, **options)


def _groups(folder: Path) -> Any:
    return build(CoPGTrainer, CoPGConfig, tiny.model(), folder, data=tiny.groups(7), **SAVING)


def _sft(folder: Path) -> Any:
    rows = tiny.pairs(7).map(lambda row: {"text": row["prompt"] + row["chosen"]}).select_columns(["text"])
    args = SFTConfig(
        output_dir=str(folder), per_device_train_batch_size=4, learning_rate=1e-3, logging_steps=1, report_to="none",
        disable_tqdm=True, max_length=64, **SAVING,
    )  # fmt: skip
    # A share of 0.2 of the attention is dropped: what is drawn comes back with the random state.
    model = tiny.model(attention_dropout=0.2)
    return SFTTrainer(model=model, args=args, train_dataset=rows, processing_class=tiny.tokenizer())


def _sampled(name: str) -> Callable[[Path], Any]:
    # Two steps a rollout: every other checkpoint is written in the middle of one.
    return lambda folder: sampled_runs.build(name, folder, **{**SAVING, "num_iterations": 2})


def _images(folder: Path) -> Any:
    options = {"learning_rate": 1e-3, "caption_dropout": 0.3, "random_flip": "image"}
    return image_trainer(build_tiny("sd"), folder, rows=pairs(7), output_dir=str(folder), **options, **SAVING)


TRAINERS: dict[str, Callable[[Path], Any]] = {
    "pairs": _pairs,
    "pairs-lora": lambda folder: _pairs(folder, peft=LORA),
    "groups": _groups,
    "sft": _sft,
    "mdpo": _sampled("mdpo"),
    "pf_ppo": _sampled("pf_ppo"),
    "fdpg": _sampled("fdpg"),
    "images": _images,
}


def gone_on(kind: str, folder: Path) -> Any:
    """Train to the end, from the newest whole checkpoint where there is one; the trainer."""
    trainer = TRAINERS[kind](folder)
    trainer.train(resume_from_checkpoint=any(folder.glob("checkpoint-*")))
    trainer.save_model(str(folder))
    return trainer
