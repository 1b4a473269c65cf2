"""Sequence classifiers of one label from a folder or a Hub name: what reward and pair-preference models are."""

import json
import logging
import os
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PretrainedConfig, PreTrainedModel

from llmalign.errors import UserError
from llmalign.pickles import refuse_pickles, require_safe_adapter, weight_options

logger = logging.getLogger(__name__)

_ADAPTER_FILE, _CONFIG_FILE = "adapter_config.json", "config.json"
_HEAD = "score"
_MEAN, _STD = "reward_mean", "reward_std"


def require_folder(path: str, way_out: str) -> None:
    """Raise UserError for a path that is not there and no Hub name either; `runs/` is where runs of one's own lie.

    Else the Hub would be asked, for a minute where there is no network, and its answer would speak of repository ids.
    """
    if path.startswith(("/", "./", "../", "~", "runs/")) and not Path(path).expanduser().is_dir():
        raise UserError(f"there is no folder {path!r}; {way_out}")


def load_classifier(
    path: str,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    attn_implementation: str | None = None,
) -> tuple[PreTrainedModel, Any]:
    """The model in evaluation mode and its own tokenizer, which can pad; an adapter is merged into its base.

    Weights are read from safetensors alone. Left open, `device` is CUDA where there
    is one and `dtype` bfloat16 there, float32 on a CPU. Raises UserError where nothing can be loaded, where the head is
    missing (a language model has none, and it would be drawn at random), and where the model has several labels. Not
    covered: sharded and quantized models.
    """
    require_folder(path, "train a model into it (trainers/reward/recipe.yaml), or check the path")
    place = torch.device(device if device is not None else "cuda" if torch.cuda.is_available() else "cpu")
    if dtype is None:
        dtype = torch.bfloat16 if place.type == "cuda" and torch.cuda.is_bf16_supported() else torch.float32
    options = {"revision": revision, "trust_remote_code": trust_remote_code}
    weights = {**options, "dtype": dtype, "attn_implementation": attn_implementation}
    adapter = (Path(path) / _ADAPTER_FILE).is_file()
    try:
        model = _with_adapter(path, weights) if adapter else _whole(path, weights)
        tokenizer = AutoTokenizer.from_pretrained(path, **options)
    except (OSError, ValueError, TypeError, KeyError) as error:
        if isinstance(error, UserError):
            raise
        reason = str(error).strip().split("\n")[0][:200]
        raise UserError(
            f"no reward model could be loaded from {path!r} ({reason}); it needs a classifier of one label in "
            "safetensors with its tokenizer beside it: check the path or name"
        ) from error
    if model.config.num_labels != 1:
        raise UserError(f"a reward model gives one number, {path!r} has {model.config.num_labels} labels")
    if tokenizer.eos_token is None:
        raise UserError(f"the tokenizer of {path!r} has no EOS token, which ends what is scored; set eos_token")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return model.to(place).eval(), tokenizer


def _whole(path: str, options: dict[str, Any]) -> PreTrainedModel:
    refuse_pickles(path)
    model, found = AutoModelForSequenceClassification.from_pretrained(
        path, output_loading_info=True, **weight_options(), **options
    )
    missing = sorted(found["missing_keys"])
    if missing:
        raise UserError(
            f"{path!r} is no reward model: it lacks {missing[0]}, which would be drawn at random; train one with "
            "method: reward, or name another"
        )
    return model


def _with_adapter(path: str, options: dict[str, Any]) -> PreTrainedModel:
    adapter = PeftConfig.from_pretrained(path)
    if _HEAD not in (adapter.modules_to_save or []):
        raise UserError(f"the adapter {path!r} holds no {_HEAD} head, so it is not a reward model's")
    base = adapter.base_model_name_or_path
    require_safe_adapter(path)
    refuse_pickles(str(base))
    logger.info("%s is an adapter: it is merged into its base model %s.", path, base)
    # The revision is the adapter's own; that of the base is in the adapter's config.
    options = {**options, "revision": adapter.revision}
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1, **weight_options(), **options)
    return PeftModel.from_pretrained(model, path).merge_and_unload()


def reward_statistics(config: PretrainedConfig) -> tuple[float, float]:
    """Mean and standard deviation of a model's rewards as its config has them; 0 and 1 where it has none."""
    known = config.to_dict()
    return float(known.get(_MEAN, 0.0)), float(known.get(_STD, 1.0))


def set_statistics(config: PretrainedConfig, mean: float, std: float) -> None:
    """Write mean and standard deviation into a config. Raises UserError unless both are finite and std > 0."""
    if not (abs(mean) < float("inf") and 0 < std < float("inf")):
        raise UserError(f"rewards of mean {mean} and standard deviation {std} cannot be normalised")
    config.update({_MEAN: mean, _STD: std})


def store_statistics(folder: str | Path, config: PretrainedConfig) -> None:
    """Copy mean and standard deviation from a config into the config.json of a saved model, which stays whole."""
    path = Path(folder) / _CONFIG_FILE
    if not path.is_file():
        raise UserError(f"there is no {path} to write the rewards' mean and deviation into; save the model there first")
    content = json.loads(path.read_text(encoding="utf-8"))
    content[_MEAN], content[_STD] = reward_statistics(config)
    aside = path.with_suffix(".tmp")
    aside.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    os.replace(aside, path)
