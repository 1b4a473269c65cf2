"""LoRA weights of a run merged into the network of their pipeline."""

from pathlib import Path

from llmalign.diffusion.denoiser import LORA_FILE
from llmalign.diffusion.embedded import pipeline_path
from llmalign.diffusion.pipelines import family_of, load_pipeline
from llmalign.diffusion.sampling import starting_point, with_adapter
from llmalign.errors import UserError


def merge_image_adapter(path: str, out: Path | str, *, base: str | None = None, dtype: str | None = None) -> str:
    """Save the pipeline of LoRA weights, with them merged in, as a diffusers folder, and return what it was made from.

    `path` is a run or checkpoint with LoRA weights; `base` replaces the pipeline that its recipe names. `dtype`
    (float32, bfloat16, float16; None: float32) is that of the network and the text encoders, in which the weights are
    added up. Raises UserError where there are no such weights, or where they are not for the pipeline. Not covered:
    adapters on adapters.
    """
    folder = Path(path).expanduser()
    if not (folder / LORA_FILE).is_file():
        raise UserError(f"{path} holds a whole pipeline: there is no adapter to merge.")
    start = starting_point(path, base)
    assert start is not None
    pipe = with_adapter(load_pipeline(pipeline_path(start), dtype=dtype), path, start)
    pipe.fuse_lora(components=[family_of(pipe).network_name])
    pipe.unload_lora_weights()
    pipe.save_pretrained(out, safe_serialization=True)
    return start
