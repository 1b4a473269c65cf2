"""Weights are read from safetensors alone: a pickle can run code while it is loaded."""

import os
from pathlib import Path
from typing import Any

from transformers.utils import cached_file

from llmalign.errors import UserError

ALLOW = "LLMALIGN_ALLOW_PICKLE"
_WEIGHTS = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
_ADAPTER_CONFIG, _ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_WAY_OUT = (
    f"save them as safetensors (save_pretrained does), or set the environment variable {ALLOW}=1 if you trust where "
    "they come from"
)


def pickles_allowed() -> bool:
    """Whether the user has set `LLMALIGN_ALLOW_PICKLE=1`; no recipe and no data set can."""
    return os.environ.get(ALLOW) == "1"


def weight_options() -> dict[str, Any]:
    """What `from_pretrained` of transformers and diffusers takes, so that it reads no pickle unless the user allows."""
    return {} if pickles_allowed() else {"use_safetensors": True}


def refuse_pickles(path: str) -> None:
    """Raise UserError where the folder of a model or an adapter holds its weights as pickles alone.

    Names on the Hub are left to `from_pretrained` with `weight_options`, adapters there to `require_safe_adapter`.
    """
    folder = Path(path).expanduser()
    if pickles_allowed() or not folder.is_dir():
        return
    wanted = _ADAPTER_WEIGHTS if (folder / _ADAPTER_CONFIG).is_file() else "*.safetensors"
    if next(folder.glob(wanted), None) is not None:
        return
    pickles = sorted(file.name for pattern in _WEIGHTS for file in folder.glob(pattern))
    weights = [name for name in pickles if name != "training_args.bin"]
    if weights:
        raise UserError(f"the weights in {path} are a pickle ({weights[0]}), which can run code: {_WAY_OUT}.")


def require_safe_adapter(path: str, revision: str | None = None) -> None:
    """Raise UserError where an adapter, in a folder or on the Hub, has no safetensors: PEFT would read its pickle.

    Where there is no adapter at all, it says so.
    """
    if pickles_allowed():
        return
    _require(path, _ADAPTER_CONFIG, revision, f"no adapter could be loaded from {path!r}; check the path or name")
    without = f"the adapter {path} has no {_ADAPTER_WEIGHTS}, and a pickle can run code: {_WAY_OUT}."
    _require(path, _ADAPTER_WEIGHTS, revision, without)


def _require(path: str, name: str, revision: str | None, otherwise: str) -> None:
    try:
        cached_file(path, name, revision=revision)
    except OSError as error:
        raise UserError(otherwise) from error
