"""Trained text models, ready to answer: a run's folder, a checkpoint, an adapter beside its base, a name on the Hub."""

import logging
import re
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase
from transformers.utils import find_adapter_config_file

from llmalign.embedded import ensure_tiny
from llmalign.errors import UserError
from llmalign.trainers.loading import load_tokenizer

logger = logging.getLogger(__name__)

EMBEDDED = "embedded:tiny"
_LOCAL = ("/", "./", "../", "~", "runs/")
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")


def model_name(model: str) -> str:
    """A short name to show: a folder's last part (`run/checkpoint-9` for a checkpoint), a Hub name whole."""
    if model == EMBEDDED or not Path(model).expanduser().exists():
        return model
    folder = Path(model).expanduser().resolve()
    return f"{folder.parent.name}/{folder.name}" if _CHECKPOINT.fullmatch(folder.name) else folder.name


def model_identity(model: str) -> str:
    """What stands for a model's weights: sizes and times of the files of a folder, or its name.

    Cheap, and enough to notice that a folder was trained further; a Hub name's newer revision is not noticed.
    """
    path = _folder(model)
    if not Path(path).is_dir():
        return path
    files = sorted(file for file in Path(path).iterdir() if file.suffix in (".safetensors", ".json", ".bin"))
    return " ".join([path, *(f"{file.name}:{file.stat().st_size}:{file.stat().st_mtime_ns}" for file in files)])


def load_for_inference(
    model: str,
    *,
    base: str | None = None,
    revision: str | None = None,
    dtype: str | None = None,
    device: torch.device | str | None = None,
    trust_remote_code: bool = False,
) -> tuple[Any, PreTrainedTokenizerBase]:
    """The model in evaluation mode and its tokenizer, which can end and pad a text.

    `model` is a run's folder, a checkpoint, an adapter (put beside its base, not merged; `base` replaces the one that
    it names), a whole model's folder, a Hub name or `embedded:tiny`. `dtype` None: bfloat16 on a GPU that has it, else
    float32; `device` None: the first GPU, else the CPU. What was chosen is logged. Raises UserError where a folder
    holds no text model, and for a base that is not there. Not covered: models split over several processes, image
    pipelines.
    """
    path = _folder(model)
    device = torch.device(device) if device is not None else _device()
    options: dict[str, Any] = {"dtype": dtype or _dtype(device), "trust_remote_code": trust_remote_code}
    try:
        found = find_adapter_config_file(path, revision=revision)
        if found is None:
            if base is not None:
                raise UserError(f"{model} is no adapter, so it has no base: leave --base out")
            loaded = AutoModelForCausalLM.from_pretrained(path, revision=revision, **options)
        else:
            loaded = _adapter(model, path, base, revision, options)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        reason = str(error).strip().split("\n")[0][:200]
        raise UserError(f"no text model can be loaded from {model!r} ({reason}); check the path or name") from error
    tokenizer = load_tokenizer(path, revision=revision, trust_remote_code=trust_remote_code)
    logger.info("%s: %s on %s.", model_name(model), str(loaded.dtype).removeprefix("torch."), device)
    return loaded.to(device).eval(), tokenizer


def _folder(model: str) -> str:
    """Where the model lies. Raises UserError for a folder that is not there, or that holds checkpoints alone."""
    if model == EMBEDDED:
        return str(ensure_tiny())
    folder = Path(model).expanduser()
    if not folder.is_dir():
        if model.startswith(_LOCAL):
            raise UserError(f"there is no folder {model!r}; check the path of the model")
        return model
    if any((folder / name).is_file() for name in ("config.json", "adapter_config.json")):
        return str(folder)
    checkpoints = [path for path in folder.iterdir() if _CHECKPOINT.fullmatch(path.name)]
    if checkpoints:
        newest = max(checkpoints, key=lambda path: int(path.name.split("-")[1]))
        raise UserError(f"{model} is a run that has not ended; name its newest checkpoint, {newest}")
    if (folder / "model_index.json").is_file() or (folder / "pytorch_lora_weights.safetensors").is_file():
        raise UserError(f"{model} is an image model; `llmalign sample` draws with it")
    raise UserError(f"{model} holds no model: there is neither a config.json nor an adapter_config.json in it")


def _adapter(model: str, path: str, base: str | None, revision: str | None, options: dict[str, Any]) -> PeftModel:
    named = base or PeftConfig.from_pretrained(path, revision=revision).base_model_name_or_path
    if not named:
        raise UserError(f"the adapter {model} does not say which base it belongs to: name it with --base")
    named = _folder(named) if named == EMBEDDED else named
    if named.startswith(_LOCAL) and not Path(named).expanduser().is_dir():
        raise UserError(f"the adapter {model} belongs to {named}, which is not there: name its base with --base")
    logger.info("%s is an adapter, put on %s.", model_name(model), model_name(named))
    return PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(named, **options), path, revision=revision, is_trainable=False
    )


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _dtype(device: torch.device) -> str:
    return "bfloat16" if device.type == "cuda" and torch.cuda.is_bf16_supported() else "float32"
