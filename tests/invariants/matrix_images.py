"""The rows of the image trainers in the matrix; `image_cells.py` trains them."""

SAME = "same"
CONFIGS = ("ddp", "zero1", "zero2", "zero2_offload", "zero3", "fsdp2")
#: a name that image_cells.py knows -> what the page calls it
TRAINERS = {
    "diffusion_dpo-lora": "diffusion_dpo, LoRA",
    "diffusion_dpo-whole": "diffusion_dpo",
    "seppo-lora": "seppo, LoRA",
    "pso_offline-lora": "pso_offline, LoRA",
    "pso_offline-whole": "pso_offline",
    "d3po-lora": "d3po, LoRA",
    "d3po-whole": "d3po",
    "pso-lora": "pso, LoRA",
    "pso-whole": "pso",
}
#: trainer -> configuration -> "same", or why not
ROWS: dict[str, dict[str, str]] = {label: dict.fromkeys(CONFIGS, SAME) for label in TRAINERS.values()}
