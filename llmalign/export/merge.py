"""Adapters merged into the weights of their base, so that a model can be used without PEFT."""

import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from peft.tuners.tuners_utils import BaseTuner
from torch import Tensor
from transformers import AutoConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import find_adapter_config_file

from llmalign.errors import UserError
from llmalign.export.files import folder_aside, require_room
from llmalign.inference import EMBEDDED, load_for_inference

logger = logging.getLogger(__name__)

DTYPES = ("float32", "bfloat16", "float16")
TOLERANCE = 1e-3  # of merged logits, relative to the largest: above it something was merged wrongly
PROBE = 16  # tokens


@dataclass(frozen=True)
class Merged:
    """What was written where; `gap` is the largest difference of logits between merged and adapter beside its base."""

    path: Path
    base: str
    dtype: str
    gap: float


def merge_adapter(
    model: str,
    out: Path | str,
    *,
    base: str | None = None,
    revision: str | None = None,
    dtype: str | None = None,
    trust_remote_code: bool = False,
    overwrite: bool = False,
) -> Merged:
    """Merge an adapter into its base and save the whole: safetensors, tokenizer, generation config.

    `model` is the folder or Hub name of the adapter, `base` replaces the one that it names. Added up in float32 on the
    CPU and rounded once to `dtype`: None is that of the base. The logits of some tokens are compared before and after.
    Raises UserError for what is no adapter, for one without weights to merge (prompt tuning and its like), for a base
    that is stored quantised, where the output has no room, and where merging would change the answers. Not covered:
    several adapters at once.
    """
    if dtype not in (None, *DTYPES):
        raise UserError(f"--dtype of a merged model is one of {', '.join(DTYPES)}, not {dtype!r}.")
    out = Path(out).expanduser()
    require_room(out, overwrite=overwrite, sources=(model, base))
    loaded, tokenizer, named, gap = _load_merged(model, base, revision, trust_remote_code)
    require_room(out, overwrite=overwrite, sources=(named,))
    dtype = dtype or _stored_dtype(named, trust_remote_code)
    loaded.to(getattr(torch, dtype))
    with folder_aside(out, overwrite=overwrite) as aside:
        loaded.save_pretrained(aside)
        tokenizer.save_pretrained(aside)
    return Merged(out, named, dtype, gap)


def load_whole(
    model: str, *, base: str | None = None, revision: str | None = None, trust_remote_code: bool = False
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A text model on the CPU without an adapter beside it: as it is stored, or merged in float32.

    Raises UserError as `merge_adapter` and `load_for_inference` do.
    """
    if is_adapter(model, revision):
        loaded, tokenizer, _, _ = _load_merged(model, base, revision, trust_remote_code)
        return loaded, tokenizer
    return load_for_inference(
        model, base=base, revision=revision, dtype="auto", device="cpu", trust_remote_code=trust_remote_code
    )


def is_adapter(model: str, revision: str | None = None) -> bool:
    """Whether a folder or Hub name holds an adapter."""
    if model == EMBEDDED:
        return False
    try:
        return find_adapter_config_file(str(Path(model).expanduser()), revision=revision) is not None
    except (OSError, ValueError):
        return False  # what is wrong with it is said where it is loaded


def _load_merged(
    model: str, base: str | None, revision: str | None, trust_remote_code: bool
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, str, float]:
    """The merged model in float32, its tokenizer, the name of its base, and the gap of the logits."""
    if not is_adapter(model, revision):
        if _stored_config(model, trust_remote_code, revision) is not None:
            raise UserError(f"{model} is a whole model: there is no adapter to merge.")
        load_for_inference(model, base=base, revision=revision, device="cpu")  # which says what is wrong with it
    config = PeftConfig.from_pretrained(str(Path(model).expanduser()), revision=revision)
    if config.task_type not in (None, "CAUSAL_LM"):
        raise UserError(f"{model} is an adapter for {config.task_type}, not for a model that answers.")
    named = base or config.base_model_name_or_path or ""
    _refuse_quantized(model, named, trust_remote_code)
    _warn_of_quantized_training(model, named)
    beside, tokenizer = load_for_inference(
        model, base=base, revision=revision, dtype="float32", device="cpu", trust_remote_code=trust_remote_code
    )
    if not isinstance(beside, PeftModel) or not isinstance(beside.base_model, BaseTuner):
        kind = config.peft_type.value if config.peft_type is not None else "no known kind"
        raise UserError(f"{model} is an adapter of kind {kind}, whose weights cannot be merged into a model.")
    before = _probe(beside)
    merged: Any = beside.merge_and_unload()
    merged.eval()
    after = _probe(merged)
    gap = float((after - before).abs().max())
    if not gap <= TOLERANCE * max(1.0, float(before.abs().max())):
        raise UserError(
            f"merging {model} would change the logits by {gap:.3g}, as where an adapter sits on one of two tied "
            "matrices; use it beside its base"
        )
    _untie(merged)
    return merged, tokenizer, named, gap


def _probe(model: Any) -> Tensor:
    """Logits (tokens, vocabulary) of a few tokens spread over the vocabulary."""
    rows = model.get_input_embeddings().weight.shape[0]
    ids = torch.linspace(0, rows - 1, PROBE).long()[None]
    with torch.no_grad():
        return model(input_ids=ids).logits[0].float()


def _untie(model: Any) -> None:
    """Where an adapter has trained one of two tied matrices whole, both are to be saved."""
    inputs, outputs = model.get_input_embeddings(), model.get_output_embeddings()
    if model.config.tie_word_embeddings and outputs is not None and outputs.weight is not inputs.weight:
        model.config.tie_word_embeddings = False
        logger.info("The adapter has set embeddings and output layer apart: both are saved.")


def _stored_config(named: str, trust_remote_code: bool, revision: str | None = None) -> dict[str, Any] | None:
    """The config of a whole model; None where it cannot be read, which is said where it is loaded."""
    if named == EMBEDDED:
        return {}
    try:
        path = str(Path(named).expanduser())
        config = AutoConfig.from_pretrained(path, revision=revision, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError):
        return None
    return config.to_dict()


def _refuse_quantized(model: str, named: str, trust_remote_code: bool) -> None:
    config = _stored_config(named, trust_remote_code) if named else None
    if config is not None and config.get("quantization_config"):
        method = config["quantization_config"].get("quant_method", "quantised")
        raise UserError(
            f"the base of {model}, {named}, is stored quantised ({method}), and an adapter cannot be merged into "
            "rounded weights without loss: name the unquantised model with --base"
        )


def _warn_of_quantized_training(model: str, named: str) -> None:
    """Say where an adapter was trained beside 4- or 8-bit weights and is merged into the full ones."""
    folder = Path(model).expanduser()
    for file in (folder / "run.json", folder.parent / "run.json"):
        if not file.is_file():
            continue
        try:
            recipe = json.loads(file.read_text(encoding="utf-8"))
        except ValueError:
            continue
        if recipe.get("load_in_4bit") or recipe.get("load_in_8bit"):
            logger.warning(
                "%s was trained beside 4- or 8-bit weights of %s and is merged into the full ones: its answers may "
                "differ a little from those in training.", model, named,
            )  # fmt: skip
        return


def _stored_dtype(named: str, trust_remote_code: bool) -> str:
    stored = str((_stored_config(named, trust_remote_code) or {}).get("dtype") or "").removeprefix("torch.")
    return stored if stored in DTYPES else "float32"
