"""The matrix of trainers and launch configurations: what is expected of each cell, and the page's table of it.

Data alone, so that the table is made without a launch. `matrix_run.py` trains the cells of text, `image_cells.py` those
of images.
"""

from tests.invariants import matrix_images

#: configuration -> the class that the model is wrapped in
CONFIGS = {
    "ddp": "DistributedDataParallel",
    "zero1": "DeepSpeedEngine",
    "zero2": "DeepSpeedEngine",
    "zero2_offload": "DeepSpeedEngine",
    "zero3": "DeepSpeedEngine",
    "fsdp2": "FSDPModule",
}
SAME = "same"
#: the largest difference to one process of a loss, in units of its size, or of 1 where it is smaller
CLOSE = 1e-5
#: a name that matrix_run.py knows -> what the page calls it
TRAINERS = {
    "rpo": "rpo",
    "rpo_lora": "rpo, LoRA, checkpointing",
    "rdpo": "rdpo",
    "inpo": "inpo",
    "copg": "copg",
    "pair": "pair",
    "dpo": "dpo",
    "sft": "sft",
    "reward": "reward",
    "preference": "preference",
    "copg_online": "copg_online",
    "fdpg": "fdpg",
    "mdpo": "mdpo",
    "pf_ppo": "pf_ppo, `critic: head`",
    "pf_ppo_model": "pf_ppo, `critic: model`",
    "pf_ppo_group": "pf_ppo, `advantage: group`",
}
#: where a trainer says that it cannot be trained like this: words of its sentence
SECOND = "critic: model is a second network"
UNSHARDED = "a critic is not trained under FSDP"
REFUSED = {
    **{("pf_ppo_model", config): SECOND for config in ("zero1", "zero2", "zero2_offload", "zero3")},
    ("pf_ppo_model", "fsdp2"): UNSHARDED,
    ("pf_ppo", "fsdp2"): UNSHARDED,
}
#: one launch each in the quick suite, of trainers that differ in what they ask of a wrapper; DDP has test_commands.py
QUICK = {"zero3": ("rpo_lora",), "fsdp2": ("mdpo",)}


def expected(trainer: str, config: str) -> str:
    """SAME, or the words of the refusal."""
    return REFUSED.get((trainer, config), SAME)


def _cell(trainer: str, config: str) -> str:
    words = expected(trainer, config)
    return SAME if words == SAME else f"refused: {words}"


def table() -> list[str]:
    """The lines of the table in accelerate_configs/README.md."""
    rows = {label: {config: _cell(name, config) for config in CONFIGS} for name, label in TRAINERS.items()}
    rows |= matrix_images.ROWS
    lines = [f"| trainer | {' | '.join(CONFIGS)} |", f"|---|{'---|' * len(CONFIGS)}"]
    lines += [f"| {label} | {' | '.join(cells[config] for config in CONFIGS)} |" for label, cells in rows.items()]
    return lines


if __name__ == "__main__":  # python -m tests.invariants.matrix: the lines for the page
    print("\n".join(table()))
