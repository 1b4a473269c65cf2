"""Trained text models, ready to answer: a run's folder, a checkpoint, an adapter beside its base, a name on the Hub."""

import json
import logging
import re
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerBase
from transformers.utils import find_adapter_config_file

from llmalign.embedded import ensure_tiny
from llmalign.errors import UserError
from llmalign.pickles import refuse_pickles, require_safe_adapter, weight_options
from llmalign.trainers.loading import load_tokenizer

logger = logging.getLogger(__name__)

EMBEDDED = "embedded:tiny"
DTYPES = ("float32", "bfloat16", "float16", "auto")
_UNREADABLE = (
    OSError, ValueError, KeyError, TypeError, RuntimeError, ImportError, SafetensorError, UnpicklingError,
)  # fmt: skip
_LOCAL = ("/", "./", "../", "~", "runs/")
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")


def model_name(model: str) -> str:
    """A short name to show: a folder's last part (`run/checkpoint-9` for a checkpoint), a Hub name whole."""
    if model == EMBEDDED or not Path(model).expanduser().exists():
        return model
    folder = Path(model).expanduser().resolve()
    return f"{folder.parent.name}/{folder.name}" if _CHECKPOINT.fullmatch(folder.name) else folder.name


def model_identity(model: str, base: str | None = None) -> str:
    """What stands for a model's weights: sizes and times of the files of a folder, or its name.

    An adapter's has that of its base in it: `base`, or the one that it names. Cheap, and enough to notice that a folder
    was trained further; a Hub name's newer revision is not noticed. Raises UserError for a folder without a model.
    """
    path = Path(_folder(model))
    if not path.is_dir():
        return str(path) if base is None else f"{path} on {model_identity(base)}"
    path = path.resolve()
    files = sorted(file for file in path.iterdir() if file.suffix in (".safetensors", ".json", ".bin"))
    states = [(file.name, file.stat()) for file in files]
    identity = " ".join([str(path), *(f"{name}:{state.st_size}:{state.st_mtime_ns}" for name, state in states)])
    base = base or _base_in(path)
    return identity if base is None else f"{identity} on {model_identity(base)}"


def _base_in(folder: Path) -> str | None:
    """The base that an adapter's folder names; None for a whole model, and for a base that is not there."""
    try:
        config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise UserError(f"{folder / 'adapter_config.json'} cannot be read ({error}); save the adapter again") from error
    named = config.get("base_model_name_or_path") or None
    return None if named is None or _is_gone(named) else named


def _is_gone(named: str) -> bool:
    return named.startswith(_LOCAL) and not Path(named).expanduser().is_dir()


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
    holds no text model, such as a reward model's, for a base that is not there, and for another dtype than those of
    `DTYPES`. Not covered: models split over several processes, image
    pipelines.
    """
    if dtype not in (None, *DTYPES):
        raise UserError(f"--dtype is one of {', '.join(DTYPES)}, not {dtype!r}.")
    path = _folder(model)
    device = torch.device(device) if device is not None else _device()
    options: dict[str, Any] = {"dtype": dtype or _dtype(device), "trust_remote_code": trust_remote_code}
    options |= weight_options()
    try:
        found = find_adapter_config_file(path, revision=revision)
        if found is None:
            if base is not None:
                raise UserError(f"{model} is no adapter, so it has no base: leave --base out")
            _refuse_classifier(model, path, revision, trust_remote_code)
            refuse_pickles(path)
            loaded = AutoModelForCausalLM.from_pretrained(path, revision=revision, **options)
        else:
            loaded = _adapter(model, path, base, revision, options)
        tokenizer = load_tokenizer(path, revision=revision, trust_remote_code=trust_remote_code)
    except UserError:
        raise
    except _UNREADABLE as error:
        reason = str(error).strip().split("\n")[0][:200]
        raise UserError(f"no text model can be loaded from {model!r} ({reason}); check the path or name") from error
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


def _refuse_classifier(model: str, path: str, revision: str | None, trust_remote_code: bool) -> None:
    """transformers would load it, with a random layer in the place of the words."""
    config = AutoConfig.from_pretrained(path, revision=revision, trust_remote_code=trust_remote_code)
    kinds = [kind for kind in config.architectures or () if kind.endswith("Classification")]
    if kinds:
        raise UserError(f"{model} scores texts and writes none ({kinds[0]}); a judge takes it as --reward_model")


def _adapter(model: str, path: str, base: str | None, revision: str | None, options: dict[str, Any]) -> PeftModel:
    config = PeftConfig.from_pretrained(path, revision=revision)
    if config.task_type not in (None, "CAUSAL_LM"):
        raise UserError(f"{model} is an adapter for {config.task_type}, not for a model that answers")
    named = base or config.base_model_name_or_path
    if not named:
        raise UserError(f"the adapter {model} does not say which base it belongs to: name it with --base")
    named = _folder(named) if named == EMBEDDED else named
    if _is_gone(named):
        raise UserError(f"the adapter {model} belongs to {named}, which is not there: name its base with --base")
    require_safe_adapter(path, revision)
    refuse_pickles(named)
    logger.info("%s is an adapter, put on %s.", model_name(model), model_name(named))
    return PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(named, **options), path, revision=revision, is_trainable=False
    )


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _dtype(device: torch.device) -> str:
    return "bfloat16" if device.type == "cuda" and torch.cuda.is_bf16_supported() else "float32"
