"""The page that goes to the Hub with a trained pipeline or LoRA file."""

from pathlib import Path
from typing import Any

import diffusers
import peft
import torch
import transformers
from huggingface_hub import ModelCard, ModelCardData

PAPERS = {
    "DiffusionPreferenceTrainer": ("Diffusion-DPO", "2311.12908"),
    "SePPOTrainer": ("SePPO", "2410.05255"),
    "PSOOfflineTrainer": ("PSO", "2410.03190"),
    "PSOTrainer": ("PSO", "2410.03190"),
    "D3POTrainer": ("D3PO", "2311.13231"),
}
USE = """\
```python
import torch
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained("{pipeline}")
{adapter}image = pipe("a prompt", generator=torch.Generator().manual_seed(0)).images[0]
```"""


def write_card(trainer: Any, folder: Path) -> None:
    """Write `README.md` into `folder`: what was trained, from what, how, and the last measurements."""
    method, paper = next(PAPERS[kind.__name__] for kind in type(trainer).__mro__ if kind.__name__ in PAPERS)
    lora = trainer.accelerator.unwrap_model(trainer.model).has_adapters
    base = trainer.start if trainer.start is not None and not Path(trainer.start).exists() else None
    data = ModelCardData(
        library_name="diffusers",
        base_model=base,
        pipeline_tag="text-to-image",
        tags=["llmalign", "text-to-image", method.lower(), *(["lora"] if lora else [])],
    )
    folder_name = folder.name
    use = USE.format(
        pipeline=(base or "BASE") if lora else folder_name,
        adapter=f'pipe.load_lora_weights("{folder_name}")\n' if lora else "",
    )
    versions = ", ".join(f"{module.__name__} {module.__version__}" for module in (torch, transformers, diffusers, peft))
    text = (
        f"---\n{data.to_yaml()}\n---\n\n# {folder_name}\n\n"
        f"{'LoRA weights' if lora else 'A pipeline'} trained with {method} (https://arxiv.org/abs/{paper}) by llmalign:"
        f" {trainer.describe()}.\n\n{use}\n\n{_measured(trainer.state.log_history)}Versions: {versions}.\n"
    )
    ModelCard(text).save(folder / "README.md")


def _measured(history: list[dict[str, Any]]) -> str:
    measured = [entry for entry in history if any(key.startswith("eval_") for key in entry)]
    if not measured:
        return ""
    keys = [key for key in measured[-1] if key.startswith("eval_") and not key.endswith(("_runtime", "_second"))]
    lines = [f"| {key.removeprefix('eval_')} | {measured[0].get(key, '')} | {measured[-1][key]} |" for key in keys]
    first, last = measured[0]["step"], measured[-1]["step"]
    return "\n".join([f"| held out | step {first} | step {last} |", "|---|---|---|", *lines]) + "\n\n"
