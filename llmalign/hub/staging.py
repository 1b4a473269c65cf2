"""What of a run goes to the Hub: model, tokenizer and measurements; no checkpoints, pickles, secrets or paths."""

import hashlib
import json
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmalign.errors import UserError

MANIFEST = "llmalign-manifest.json"
FORMAT = 1
CARD = "README.md"
RUN, METRICS, CURVES, EVALUATION = "run.json", "metrics.json", "curves.png", "evaluation/evaluation.json"

TEXT_FILES = (
    "config.json", "generation_config.json", "model*.safetensors", "model.safetensors.index.json",
    "adapter_config.json", "adapter_model.safetensors", "tokenizer*.json", "tokenizer.model", "special_tokens_map.json",
    "added_tokens.json", "vocab.*", "merges.txt", "spiece.model", "chat_template.j*", "additional_chat_templates/*",
)  # fmt: skip
IMAGE_FILES = ("model_index.json", "pytorch_lora_weights.safetensors")
COMPONENT_FILES = ("*.json", "*.safetensors", "*.txt", "*.model", "*.jinja")
RECORDS = (METRICS, RUN, CURVES, EVALUATION, "evaluation/leaderboard.csv")
WEIGHTS = re.compile(r"(model.*|adapter_model|pytorch_lora_weights|diffusion_pytorch_model.*)\.safetensors")
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
SECRET = re.compile(r"(^|_)(token|password|secret|api_?key)$", re.IGNORECASE)
PATH_KEYS = ("_name_or_path", "name_or_path", "base_model_name_or_path", "model_name_or_path")
CONFIGS = ("config.json", "tokenizer_config.json", "adapter_config.json", "generation_config.json", "model_index.json")


@dataclass(frozen=True)
class Staged:
    """A folder as it will be on the Hub, its files with sizes and SHA-256, and what kind of model it holds."""

    folder: Path
    kind: str  # model, adapter, pipeline or image_adapter
    files: dict[str, dict[str, Any]]

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(entry["size"] for entry in self.files.values())


def kind_of(run: Path) -> str:
    """What a folder holds: a whole model, an adapter, an image pipeline, or LoRA weights of one.

    Raises UserError where it holds none, or a run that has not ended, with the way out.
    """
    marks = {
        "adapter": "adapter_config.json", "pipeline": "model_index.json",
        "image_adapter": "pytorch_lora_weights.safetensors", "model": "config.json",
    }  # fmt: skip
    if not run.is_dir():
        raise UserError(f"there is no folder {run}; name a run's folder")
    kind = next((kind for kind, name in marks.items() if (run / name).is_file()), None)
    if kind is not None:
        return kind
    checkpoints = [path.name for path in run.glob("checkpoint-*")]
    if checkpoints:
        newest = max(checkpoints, key=lambda name: int(name.rsplit("-", 1)[1]))
        raise UserError(f"{run} is a run that has not ended; push a checkpoint of it, such as {run / newest}")
    raise UserError(f"{run} holds no model: there is no config.json, adapter_config.json or model_index.json in it")


def stage(run: Path, folder: Path, card: str, *, base: str | None = None) -> Staged:
    """Lay out in `folder`, which is emptied, what goes to the Hub, with its card and its manifest.

    Weights are linked where the file system can, JSON is cleaned of secrets and of this machine's paths, and an
    adapter's base is `base` where that is given. Two calls on the same run give the same bytes. Raises UserError as
    `kind_of` does, and for weights that are pickles alone.
    """
    kind = kind_of(run)
    names = _names(run, kind)
    if not any(WEIGHTS.fullmatch(Path(name).name) for name in names):
        pickles = sorted(
            path.name for pattern in PICKLES for path in run.glob(pattern) if path.name != "training_args.bin"
        )
        if pickles:
            raise UserError(
                f"the weights of {run} are pickles ({pickles[0]}), which run code when they are loaded; save them as "
                "safetensors first (model.save_pretrained does)"
            )
        raise UserError(f"there are no weights in {run}")
    shutil.rmtree(folder, ignore_errors=True)
    for name in names:
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if Path(name).name in CONFIGS or name in (RUN, METRICS, EVALUATION):
            _write_json(target, _cleaned_file(run / name, base, whole=name in (RUN, METRICS, EVALUATION)))
        else:
            _link(run / name, target)
    (folder / CARD).write_text(card, encoding="utf-8")
    files = {name: _entry(folder / name) for name in sorted([*names, CARD])}
    _write_json(folder / MANIFEST, {"format": FORMAT, "kind": kind, "files": files})
    return Staged(folder, kind, {**files, MANIFEST: _entry(folder / MANIFEST)})


def cleaned(content: Any) -> Any:
    """JSON without secrets, and with the last part alone of every path that leads through this machine."""
    if isinstance(content, dict):
        return {key: cleaned(value) for key, value in content.items() if not SECRET.search(str(key))}
    if isinstance(content, list):
        return [cleaned(value) for value in content]
    return _shortened(content) if isinstance(content, str) else content


def sha256(path: Path) -> str:
    """The SHA-256 of a file in hexadecimal."""
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def _names(run: Path, kind: str) -> list[str]:
    """Files of a run that go, relative to it."""
    patterns = TEXT_FILES if kind in ("model", "adapter") else IMAGE_FILES
    found = {path for pattern in patterns for path in run.glob(pattern)}
    if kind == "pipeline":
        index = json.loads((run / "model_index.json").read_text(encoding="utf-8"))
        parts = [name for name, value in index.items() if isinstance(value, list) and (run / name).is_dir()]
        found |= {path for part in parts for pattern in COMPONENT_FILES for path in (run / part).glob(pattern)}
    found |= {run / name for name in RECORDS}
    return sorted(path.relative_to(run).as_posix() for path in found if path.is_file() and not path.is_symlink())


def _cleaned_file(path: Path, base: str | None, *, whole: bool) -> Any:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is no JSON ({error}); is it half-written?") from error
    if whole:
        return cleaned(content)
    for key in PATH_KEYS:
        if isinstance(content.get(key), str):
            content[key] = base if base is not None and key == "base_model_name_or_path" else _shortened(content[key])
    return content


def _shortened(text: str) -> str:
    """The last part of an absolute path; other texts as they are."""
    return Path(text).name if re.match(r"(/|~/|[A-Za-z]:\\)[^\s]*$", text) else text


def _entry(path: Path) -> dict[str, Any]:
    return {"size": path.stat().st_size, "sha256": sha256(path)}


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
