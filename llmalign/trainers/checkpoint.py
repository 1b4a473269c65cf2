"""Checkpoints that are whole or not there, and the rules for going on from one.

A checkpoint is written under `<output_dir>/_incomplete/` and renamed into place once every byte of it is on the disk:
a run that is killed at any moment leaves only whole ones behind. What is resumed from is checked first, because the
Trainer itself goes on without a missing optimizer, scheduler or random state and ends at other weights.
"""

import json
import logging
import os
import re
import shutil
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedModel, Trainer
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from llmalign.errors import UserError

logger = logging.getLogger(__name__)

ASIDE = "_incomplete"
RUN_FILE = "run.json"
WAY_OUT = "resume from another checkpoint, or start again in a new output_dir"

# What holds weights, and what holds an optimizer: one process or DDP, FSDP (one file or sharded), DeepSpeed; diffusers.
WEIGHTS = (
    "model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json",
    "adapter_model.safetensors", "adapter_model.bin", "*/adapter_model.safetensors", "pytorch_model_fsdp*",
    "global_step*", "pytorch_lora_weights.safetensors", "*/diffusion_pytorch_model*.safetensors",
)  # fmt: skip
OPTIMIZERS = ("optimizer.pt", "optimizer.bin", "optimizer_0*", "global_step*")

# Recipe keys that may change between the start of a run and its resumption: none of them reaches the weights.
HARMLESS_KEYS = frozenset(
    """
    output_dir resume save_total_limit per_device_eval_batch_size eval_accumulation_steps dataloader_pin_memory
    logging_dir logging_first_step logging_steps logging_strategy log_level log_level_replica disable_tqdm
    report_to run_name project trackio_space_id alarm_chosen_drop alarm_prompts alarm_new_tokens
    reference_cache_dir image_cache_dir encode_batch_size
    push_to_hub hub_model_id hub_strategy hub_token hub_private_repo hub_always_push hub_revision
    """.split()
)
SECRET_KEYS = frozenset({"hub_token"})


class SafeCheckpointMixin(Trainer):
    """Makes any `transformers.Trainer` write checkpoints aside and rename them, and refuse a broken one to resume from.

    Put it before the trainer in the bases. Rotation and the push to the Hub happen after the rename. Several machines
    need one folder that all of them see, or `save_on_each_node`. Not covered: SageMaker and XLA.
    """

    _writing_aside: bool = False

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Train, or go on from a checkpoint after checking that it is whole; `True` is the newest whole one.

        Raises:
            UserError: the checkpoint lacks something that the rest of the run depends on.
        """
        if resume_from_checkpoint is True:
            resume_from_checkpoint = resolve_resume("auto", self.args.output_dir, self.args.world_size)
        elif resume_from_checkpoint:
            check_whole(resume_from_checkpoint, self.args.world_size)
        return super().train(resume_from_checkpoint or None, *args, **kwargs)

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        # Of weights that are tied one is saved, and loading it has filled the others.
        tied = self.model.all_tied_weights_keys if isinstance(self.model, PreTrainedModel) else {}
        missing = [name for name in load_result.missing_keys if name not in tied]
        super()._issue_warnings_after_load(type(load_result)(missing, load_result.unexpected_keys))

    def _get_output_dir(self, trial: Any) -> str:
        run_dir = super()._get_output_dir(trial)
        return os.path.join(run_dir, ASIDE) if self._writing_aside else run_dir

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if not self._writing_aside:
            super()._push_from_checkpoint(checkpoint_folder)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        run_dir = Path(self._get_output_dir(trial))
        final = run_dir / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        aside = run_dir / ASIDE / final.name
        if self.args.should_save and aside.parent.exists():
            shutil.rmtree(aside.parent)
        self.accelerator.wait_for_everyone()

        self._writing_aside = True
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self._writing_aside = False
        if self.state.best_global_step:
            candidate = run_dir / f"{PREFIX_CHECKPOINT_DIR}-{self.state.best_global_step}"
            if candidate == final or candidate.is_dir():
                self.state.best_model_checkpoint = str(candidate)

        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            self.state.save_to_json(str(aside / TRAINER_STATE_NAME))
            _publish(aside, final)
        self.accelerator.wait_for_everyone()
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(final))
        if self.args.should_save:
            _rotate(run_dir, final, self.args.save_total_limit, self.state.best_model_checkpoint)


def check_whole(path: str | Path, world_size: int | None = None) -> None:
    """Check that training can go on from the checkpoint at `path` and end where the uninterrupted run would have ended.

    Looked at: weights (every shard, each of the size that its header promises), optimizer, scheduler, the random state
    of each of `world_size` processes (default: what the launcher says), `trainer_state.json`. Of the files that
    `torch.save` wrote the archive's structure is checked, not the checksums; of FSDP's shards only that they are there.
    Not covered: the gradient scaler of fp16.

    Raises:
        UserError: something is missing or broken; the sentence names it.
    """
    fault = _fault(Path(path), world_size)
    if fault is not None:
        raise UserError(f"{path} cannot be resumed from: {fault}; {WAY_OUT}.")


def find_resumable(output_dir: str | Path, world_size: int | None = None) -> tuple[Path | None, list[tuple[Path, str]]]:
    """Return the whole checkpoint with the highest step (or None), and each newer one with what is wrong with it."""
    skipped: list[tuple[Path, str]] = []
    for folder in reversed(_checkpoints(Path(output_dir))):
        fault = _fault(folder, world_size)
        if fault is None:
            return folder, skipped
        skipped.append((folder, fault))
    return None, skipped


def resolve_resume(resume: str | None, output_dir: str | Path, world_size: int | None = None) -> str | None:
    """Turn what `--resume` was given into the checkpoint to go on from; None means: from the beginning.

    `"auto"` is the newest whole checkpoint of `output_dir`, or the beginning where there is none at all.

    Raises:
        UserError: the named checkpoint is not whole, or `output_dir` holds checkpoints and none of them is whole.
    """
    if resume is None:
        return None
    if resume != "auto":
        check_whole(resume, world_size)
        logger.info("Resuming from %s.", resume)
        return resume
    found, skipped = find_resumable(output_dir, world_size)
    if (Path(output_dir) / ASIDE).exists():
        logger.info("%s holds a checkpoint whose writing was cut off; it is not used.", Path(output_dir) / ASIDE)
    for folder, fault in skipped:
        logger.warning("Skipped %s: %s.", folder, fault)
    if found is None and skipped:
        reasons = "; ".join(f"{folder.name}: {fault}" for folder, fault in skipped)
        raise UserError(
            f"None of the checkpoints in {output_dir} can be resumed from ({reasons}); "
            "start again in a new output_dir, or delete these checkpoints."
        )
    if found is None:
        logger.info("%s holds no checkpoint: starting from the beginning.", output_dir)
        return None
    logger.info("Resuming from %s, the newest whole checkpoint.", found)
    return str(found)


def guard_output_dir(
    output_dir: str | Path,
    resume: str | None,
    fingerprint: Mapping[str, Any],
    harmless: Iterable[str] = HARMLESS_KEYS,
) -> None:
    """Refuse an output folder that holds another run; writes nothing (see `record_run`), looks on rank 0 alone.

    Without `resume` the folder must hold no run at all. With it, `fingerprint` (the resolved recipe) must equal the one
    that the run was started with, except for `harmless` keys.

    Raises:
        UserError: another run is there, or the recipe changed in a key that changes the result (named, old -> new).
    """
    if int(os.environ.get("RANK", "0")) != 0:
        return
    folder = Path(output_dir).resolve()
    # A checkpoint of another folder brings its own run file; the output folder must then be free.
    home = folder if resume is None or resume == "auto" else Path(resume).resolve().parent
    traces = _traces(folder)
    if traces and (resume is None or home != folder):
        raise UserError(
            f"output_dir {folder} holds another run ({traces[0]}); "
            "go on with it by --resume auto, or give a new output_dir."
        )
    if resume is None or not set(_traces(home)) - {ASIDE, RUN_FILE}:
        return
    if (home / RUN_FILE).exists():
        compare_recipes(home / RUN_FILE, fingerprint, frozenset(harmless))
    elif _checkpoints(home):
        logger.warning("%s has no %s, so its recipe cannot be compared with this one.", home, RUN_FILE)
    else:
        raise UserError(f"output_dir {folder} holds weights of another origin ({traces[0]}); give a new output_dir.")


def record_run(output_dir: str | Path, fingerprint: Mapping[str, Any]) -> None:
    """Write the resolved recipe to `<output_dir>/run.json`, atomically and without secrets, on rank 0 alone."""
    if int(os.environ.get("RANK", "0")) != 0:
        return
    folder = Path(output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f"{RUN_FILE}.tmp"
    temporary.write_text(json.dumps(as_plain(fingerprint), indent=2, sort_keys=True) + "\n", encoding="utf-8")
    _sync(temporary)
    os.replace(temporary, folder / RUN_FILE)
    _sync(folder)


def as_plain(fingerprint: Mapping[str, Any]) -> dict[str, Any]:
    """The resolved recipe as JSON holds it, without secrets."""
    public = {key: value for key, value in fingerprint.items() if key not in SECRET_KEYS}
    plain: dict[str, Any] = json.loads(json.dumps(public, default=str))
    return plain


def compare_recipes(run_file: Path, fingerprint: Mapping[str, Any], harmless: frozenset[str]) -> None:
    """Raise UserError where the resolved recipe in `run_file` differs in more than `harmless` keys."""
    try:
        before = json.loads(run_file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{run_file} is not readable as JSON ({error}); start again in a new output_dir.") from error
    now = as_plain(fingerprint)
    changed = [
        f"{key} {before.get(key)!r} -> {now.get(key)!r}"
        for key in sorted((before.keys() | now.keys()) - harmless - SECRET_KEYS)
        if before.get(key) != now.get(key)
    ]
    if changed:
        raise UserError(
            f"The run in {run_file.parent} was started with another recipe ({', '.join(changed)}); "
            "resume it with the old values, or give a new output_dir."
        )


def _traces(folder: Path) -> list[str]:
    """Names in `folder` that only a run leaves there, checkpoints first."""
    weights = ("model*.safetensors", "adapter_model.*", "pytorch_model*.bin", "pytorch_lora_weights.*")
    patterns = (f"{PREFIX_CHECKPOINT_DIR}-*", *weights, "model_index.json", ASIDE)
    found = [path.name for pattern in patterns for path in sorted(folder.glob(pattern))]
    return found + [RUN_FILE] * (folder / RUN_FILE).exists()


def _step(folder: Path) -> int:
    return int(folder.name.rsplit("-", 1)[1])


def _checkpoints(run_dir: Path) -> list[Path]:
    """The checkpoint folders of a run, oldest first by step: a copied folder keeps its name, not its times."""
    name = re.compile(rf"{PREFIX_CHECKPOINT_DIR}-\d+")
    return sorted((p for p in run_dir.glob("*") if name.fullmatch(p.name) and p.is_dir()), key=_step)


def _publish(aside: Path, final: Path) -> None:
    """Bring `aside` to the disk wholly, then rename it to `final`, in place of a checkpoint of the same step."""
    for folder, _, files in os.walk(aside):
        for file in files:
            _sync(Path(folder) / file)
        _sync(Path(folder))
    if final.exists():
        os.rename(final, aside.parent / f"replaced-{final.name}")
    os.rename(aside, final)
    _sync(final.parent)
    shutil.rmtree(aside.parent)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _rotate(run_dir: Path, newest: Path, limit: int | None, best: str | None) -> None:
    """Keep `limit` checkpoints, `newest` and `best` always among them; each other one leaves in a single rename.

    The Trainer's own rotation takes the highest step for the newest: after going back behind a broken checkpoint it
    would keep that one and delete what was just saved. Steps beyond `newest` go first here.
    """
    if limit is None or limit <= 0:
        return
    kept = {newest.name} | ({Path(best).name} if best is not None else set())
    others = [folder for folder in _checkpoints(run_dir) if folder.name not in kept]
    others.sort(key=lambda folder: (_step(folder) < _step(newest), _step(folder)))
    for folder in others[: max(0, len(others) + len(kept) - limit)]:
        doomed = run_dir / ASIDE / folder.name
        doomed.parent.mkdir(exist_ok=True)
        os.rename(folder, doomed)
        shutil.rmtree(doomed.parent)


def _fault(folder: Path, world_size: int | None) -> str | None:
    """What keeps a run from being resumed from `folder`, or None."""
    if not folder.is_dir():
        return "there is no such folder"
    if not (folder / TRAINER_STATE_NAME).exists() and _checkpoints(folder):
        return f"it is a run, not a checkpoint; name one of its folders, such as {_checkpoints(folder)[-1].name}"
    return _missing(folder, world_size or int(os.environ.get("WORLD_SIZE", "1"))) or _broken(folder)


def _has(folder: Path, *patterns: str) -> bool:
    return any(next(folder.glob(pattern), None) for pattern in patterns)


def _missing(folder: Path, world_size: int) -> str | None:
    """What a checkpoint needs and `folder` does not hold."""
    if not (folder / TRAINER_STATE_NAME).is_file():
        return f"{TRAINER_STATE_NAME}, which is written last, is missing"
    if not _has(folder, *WEIGHTS):
        return "the weights (model.safetensors, adapter_model.safetensors or a pipeline's) are missing"
    if not _has(folder, *OPTIMIZERS, "scheduler.pt", "rng_state*.pth"):
        return "it holds weights alone (save_only_model), without optimizer, scheduler and random state"
    if not _has(folder, *OPTIMIZERS):
        return "the optimizer state (optimizer.pt) is missing"
    # DeepSpeed may keep the scheduler with its optimizer; where it does not, the Trainer itself insists on the file.
    if not _has(folder, "scheduler.pt", "global_step*"):
        return "the scheduler state (scheduler.pt) is missing"
    states = {path.name for path in folder.glob("rng_state*.pth")}
    expected = _random_state_names(world_size)
    if states == expected:
        return None
    if states and states == _random_state_names(len(states)) or not expected - states:
        return f"{len(states)} process(es) left their random state and this run has {world_size}; start as many"
    return f"the random state ({min(expected - states)}) is missing"


def _random_state_names(world_size: int) -> set[str]:
    return {"rng_state.pth"} if world_size == 1 else {f"rng_state_{rank}.pth" for rank in range(world_size)}


def _broken(folder: Path) -> str | None:
    """The first file in `folder` that is not whole, judged by its structure."""
    try:
        whole = "global_step" in json.loads((folder / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
    except ValueError:
        whole = False
    if not whole:
        return f"{TRAINER_STATE_NAME} is cut off or damaged"
    for index in sorted(folder.rglob("*.index.json")):
        try:
            shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (ValueError, KeyError, TypeError):
            return f"{index.name} is cut off or damaged"
        lost = sorted(shard for shard in shards if not (index.parent / shard).is_file())
        if lost:
            return f"the weights {lost[0]}, named by {index.name}, are missing"
    for path in sorted(folder.rglob("*.safetensors")):
        if not _safetensors_whole(path):
            return f"{path.relative_to(folder)} is cut off or damaged"
    for path in sorted(path for suffix in ("pt", "pth", "bin") for path in folder.rglob(f"*.{suffix}")):
        if not _archive_whole(path):
            return f"{path.relative_to(folder)} is cut off or damaged"
    for shards_folder in sorted([*folder.glob("pytorch_model_fsdp_*/"), *folder.glob("optimizer_*/")]):
        if shards_folder.is_dir() and not (shards_folder / ".metadata").is_file():
            return f"{shards_folder.name}/.metadata is missing"
    return None


def _safetensors_whole(path: Path) -> bool:
    """Whether the file is as long as its header says: 8 bytes of length, the JSON header, then the tensors."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > size - 8:
            return False
        try:
            header = json.loads(file.read(length))
            ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
        except (ValueError, KeyError, TypeError, AttributeError):
            return False
    return bool(size == 8 + length + max(ends, default=0))


def _archive_whole(path: Path) -> bool:
    """Whether a file of `torch.save` (a zip archive) has its directory and every member at its place."""
    try:
        with zipfile.ZipFile(path) as archive:
            for member in archive.infolist():
                archive.open(member).close()
    except (zipfile.BadZipFile, EOFError, ValueError, OSError):
        return False
    return True
