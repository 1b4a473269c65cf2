"""What of a run goes to the Hub: model, tokenizer and measurements; no checkpoints, pickles, secrets or paths."""

import json
import logging
import os
import re
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmalign.assets import file_digest
from llmalign.errors import UserError
from llmalign.hub.cleaning import check_clean, cleaned, cleaned_config, cleaned_text, read_json
from llmalign.hub.names import check_base, loads_elsewhere

logger = logging.getLogger(__name__)

MANIFEST = "llmalign-manifest.json"
MARK = ".llmalign-dry-run"  # of a folder that may be replaced; never sent and never pulled
FORMAT = 1
CARD = "README.md"
RUN, METRICS, CURVES, EVALUATION = "run.json", "metrics.json", "curves.png", "evaluation/evaluation.json"
LEADERBOARD = "evaluation/leaderboard.csv"

TEXT_FILES = (
    "config.json", "generation_config.json", "model*.safetensors", "model.safetensors.index.json",
    "adapter_config.json", "adapter_model.safetensors", "tokenizer*.json", "tokenizer.model", "special_tokens_map.json",
    "added_tokens.json", "vocab.*", "merges.txt", "spiece.model", "chat_template.j*", "additional_chat_templates/*",
)  # fmt: skip
IMAGE_FILES = ("model_index.json", "pytorch_lora_weights.safetensors")
COMPONENT_FILES = ("*.json", "*.safetensors", "*.txt", "*.model", "*.jinja")
RECORDS = (METRICS, RUN, CURVES, EVALUATION, LEADERBOARD)
WEIGHTS = re.compile(r"(model.*|adapter_model|pytorch_lora_weights|diffusion_pytorch_model.*)\.safetensors")
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
# Names of tokens and of weights: texts that are no paths, whatever they look like.
UNCHANGED = re.compile(r"tokenizer\.json|vocab\..*|added_tokens\.json|special_tokens_map\.json|.*\.index\.json")


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
    checkpoints = [path.name for path in run.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    if checkpoints:
        newest = max(checkpoints, key=lambda name: int(name.removeprefix("checkpoint-")))
        raise UserError(f"{run} is a run that has not ended; push a checkpoint of it, such as {run / newest}")
    raise UserError(f"{run} holds no model: there is no config.json, adapter_config.json or model_index.json in it")


def stage(run: Path, folder: Path, card: str, *, base: str | None = None, link: bool = False) -> Staged:
    """Lay out in `folder` what goes to the Hub, with its card and its manifest; an earlier one there is replaced.

    JSON is cleaned of secrets and of this machine's paths, and an adapter's base is `base` where that is given. `link`
    shares the other files' bytes with the run where the file system can: for a folder that nobody edits. Two calls on
    the same run give the same bytes. Raises UserError as `kind_of` does, for weights that are pickles alone, links to
    nothing, a `folder` that holds something else or the run, and for a text that holds a path or a token after all.
    """
    check_base(base)
    kind = kind_of(run)
    folder = folder.resolve()
    _check_target(run, folder)
    names = _names(run, kind)
    _check_weights(run, kind, names)
    _warn(run, kind, base)
    try:
        return _lay_out(run, folder, kind, names, card, base, link)
    except OSError as error:
        raise UserError(f"{error.filename or folder} cannot be read or written ({error.strerror})") from error


def base_of(run: Path, kind: str) -> str | None:
    """The base that an adapter's own configuration names, as it stands there; None for a whole model."""
    if kind == "adapter":
        named = read_json(run / "adapter_config.json").get("base_model_name_or_path")
    elif kind == "image_adapter" and (run / RUN).is_file():
        named = read_json(run / RUN).get("model_name_or_path")
    else:
        return None
    return str(named) if named else None


def _lay_out(run: Path, folder: Path, kind: str, names: list[str], card: str, base: str | None, link: bool) -> Staged:
    """All files, written aside and renamed."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".hub-") as scratch:
        aside = Path(scratch) / "new"
        aside.mkdir()
        for name in names:
            (aside / name).parent.mkdir(parents=True, exist_ok=True)
            _put(run, name, aside / name, base, link)
        (aside / CARD).write_text(card, encoding="utf-8")
        check_clean(aside, [*names, CARD], run)
        files = {name: _entry(aside / name) for name in sorted([*names, CARD])}
        _write_json(aside / MANIFEST, {"format": FORMAT, "kind": kind, "files": files})
        (aside / MARK).write_text("A dry run of `llmalign push`; the next one replaces it.\n", encoding="utf-8")
        if folder.exists():
            folder.rename(Path(scratch) / "old")
        aside.rename(folder)
    return Staged(folder, kind, {**files, MANIFEST: _entry(folder / MANIFEST)})


def _check_target(run: Path, folder: Path) -> None:
    """Only what an earlier dry run wrote, and nothing besides, may be replaced."""
    here = run.resolve()
    if here.is_relative_to(folder):
        raise UserError(f"{folder} is the run or a folder above it, and would be replaced; name another with --out")
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    if not (folder / MARK).is_file() or not (folder / MANIFEST).is_file():
        raise UserError(f"{folder} holds something else than an earlier dry run; name another folder with --out")
    written = {*read_json(folder / MANIFEST)["files"], MANIFEST, MARK}
    there = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir())
    more = next((name for name in there if name not in written), None)
    if more is not None:
        raise UserError(f"{folder} holds {more}, which no dry run wrote; move it, or name another folder with --out")


def _names(run: Path, kind: str) -> list[str]:
    """Files of a run that go, relative to it; links count as what they lead to."""
    patterns = TEXT_FILES if kind in ("model", "adapter") else IMAGE_FILES
    found = {path for pattern in patterns for path in run.glob(pattern)}
    for part in _parts(run, kind):
        found |= {path for pattern in COMPONENT_FILES for path in part.glob(pattern)} | {part}
    found |= {run / name for name in RECORDS}
    lost = sorted(path.relative_to(run).as_posix() for path in found if path.is_symlink() and not path.exists())
    if lost:
        raise UserError(f"{lost[0]} of {run} is a link that leads to nothing; fetch the file, or remove the link")
    return sorted(path.relative_to(run).as_posix() for path in found if path.is_file())


def _parts(run: Path, kind: str) -> list[Path]:
    """The folders of a pipeline's components."""
    if kind != "pipeline":
        return []
    index = read_json(run / "model_index.json")
    parts = [run / name for name, value in index.items() if isinstance(value, list)]
    return [part for part in parts if part.is_dir() or part.is_symlink()]


def _check_weights(run: Path, kind: str, names: list[str]) -> None:
    """Refuses a model, and each component of a pipeline, without weights as safetensors."""
    for folder in (run, *_parts(run, kind)):
        prefix = "" if folder == run else f"{folder.name}/"
        inside = [name for name in names if name.startswith(prefix)]
        if any(WEIGHTS.fullmatch(Path(name).name) for name in inside):
            continue
        pickles = [path.name for pattern in PICKLES for path in folder.glob(pattern)]
        pickles = sorted(name for name in pickles if name != "training_args.bin")
        if pickles:
            raise UserError(
                f"the weights of {folder} are pickles ({pickles[0]}), which run code when they are loaded; save them "
                "as safetensors first (save_pretrained does)"
            )
        if folder == run:
            raise UserError(f"there are no weights in {run}")


def _warn(run: Path, kind: str, base: str | None) -> None:
    """Says what will not load elsewhere: an adapter on a base that is only here, and a model with code of its own."""
    start = base or base_of(run, kind)
    if start is not None and not loads_elsewhere(start):
        logger.warning(
            "the base of this adapter, %s, is only on this machine, so nobody else can load the adapter: "
            "--base names it on the Hub.", start,
        )  # fmt: skip
    if start is None and "adapter" in kind:
        logger.warning("nothing here tells the base of this adapter, so its card cannot say it: --base does.")
    config = read_json(run / "config.json") if (run / "config.json").is_file() else {}
    code = [name for names in (config.get("auto_map") or {}).values() for name in _listed(names)]
    if any("--" not in name for name in code):  # with it, the code is that of another repository
        logger.warning(
            "config.json has an auto_map, and the code files that it names do not go: the model loads only after you "
            "upload them yourself (`hf upload`)."
        )


def _listed(names: Any) -> list[str]:
    return [str(name) for name in (names if isinstance(names, list) else [names]) if name]


def _put(run: Path, name: str, target: Path, base: str | None, link: bool) -> None:
    """One file, cleaned where it is JSON; a configuration that is clean keeps its bytes."""
    source = (run / name).resolve()
    if name in (RUN, METRICS, EVALUATION):
        return _write_json(target, cleaned(read_json(source)))
    if name == LEADERBOARD:
        cells = re.split(r"([,\r\n])", source.read_bytes().decode("utf-8"))
        target.write_bytes("".join(cleaned_text(cell) for cell in cells).encode("utf-8"))
        return None
    if target.suffix == ".json" and not UNCHANGED.fullmatch(target.name):
        content = read_json(run / name)
        new = cleaned_config(content)
        if name == "adapter_config.json" and base is not None:
            new["base_model_name_or_path"] = base
        if new != content:
            return _write_json(target, new)
    if link:
        _link(source, target)
    else:
        shutil.copyfile(source, target)
    return None


def _entry(path: Path) -> dict[str, Any]:
    return {"size": path.stat().st_size, "sha256": file_digest(path)}


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
