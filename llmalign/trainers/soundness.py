"""Whether training can go on from a checkpoint: what must be in it, and whether each file is what was written.

A checkpoint's manifest tells the size and the hash of every file. Where there is none (an older version or plain TRL
wrote it) the files' structure is looked at, which misses changed bytes.
"""

import json
import logging
import re
import zipfile
from collections.abc import Iterable
from pathlib import Path

from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from llmalign.trainers.manifest import MANIFEST, BrokenManifest, Manifest, differences, files_of, read_manifest

logger = logging.getLogger(__name__)

# What holds weights, and what holds an optimizer: one process or DDP, FSDP (one file or sharded), DeepSpeed; diffusers.
WEIGHTS = (
    "model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json",
    "adapter_model.safetensors", "adapter_model.bin", "*/adapter_model.safetensors", "pytorch_model_fsdp*",
    "global_step*", "pytorch_lora_weights.safetensors", "*/diffusion_pytorch_model*.safetensors",
)  # fmt: skip
OPTIMIZERS = ("optimizer.pt", "optimizer.bin", "optimizer_0*", "global_step*")
# What each process wrote a part of, so that only as many can read it.
SHARDED = ("global_step*", "pytorch_model_fsdp*", "optimizer_*/")
ROLLOUTS = ("rollout_*.pt",)
ARCHIVES = (".pt", ".pth", ".bin")  # of torch.save
WEIGHTS_ALONE = "it holds weights alone (save_only_model), without optimizer, scheduler and random state"


def checkpoints(run_dir: Path) -> list[Path]:
    """The checkpoint folders of a run, oldest first by step: a copied folder keeps its name, not its times."""
    name = re.compile(rf"{PREFIX_CHECKPOINT_DIR}-\d+")
    return sorted((p for p in run_dir.glob("*") if name.fullmatch(p.name) and p.is_dir()), key=step_of)


def step_of(folder: Path) -> int:
    """The step in a checkpoint's name."""
    return int(folder.name.rsplit("-", 1)[1])


def fault(folder: Path, world_size: int, *, quick: bool = False) -> str | None:
    """What keeps a run of so many processes from going on from `folder`; `quick` does not read its files."""
    if not folder.is_dir():
        return "there is no such folder"
    own = checkpoints(folder)
    if not (folder / TRAINER_STATE_NAME).exists() and own:
        return f"it is a run, not a checkpoint; name one of its folders, such as {own[-1].name}"
    try:
        manifest = read_manifest(folder)
    except BrokenManifest as error:
        return str(error)
    if manifest is None and (found := lost_manifest(folder)) is not None:
        return found
    return missing(folder, manifest, world_size) or _changed(folder, manifest, quick=quick)


def lost_manifest(folder: Path) -> str | None:
    """What is wrong with a checkpoint that has no manifest, though one that was written before it has."""
    if not re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-\d+", folder.name):
        return None
    older = (one for one in checkpoints(folder.parent) if step_of(one) < step_of(folder))
    if any((one / MANIFEST).is_file() for one in older):
        return f"{MANIFEST} is missing, which older checkpoints beside it have"
    return None


def missing(folder: Path, manifest: Manifest | None, world_size: int) -> str | None:
    """What a checkpoint needs and `folder` does not hold."""
    if not (folder / TRAINER_STATE_NAME).is_file():
        return f"{TRAINER_STATE_NAME}, without which no checkpoint is complete, is missing"
    if not _has(folder, *WEIGHTS):
        return "the weights (model.safetensors, adapter_model.safetensors or a pipeline's) are missing"
    if not _has(folder, *OPTIMIZERS, "scheduler.pt", "rng_state*.pth"):
        return WEIGHTS_ALONE
    if not _has(folder, *OPTIMIZERS):
        return "the optimizer state (optimizer.pt) is missing"
    # DeepSpeed may keep the scheduler with its optimizer; where it does not, the Trainer itself insists on the file.
    if not _has(folder, "scheduler.pt", "global_step*"):
        return "the scheduler state (scheduler.pt) is missing"
    states = {path.name for path in folder.glob("rng_state*.pth")}
    writers = len(states) or 1
    if manifest is not None and manifest.processes is not None:
        writers = manifest.processes
    elif states != random_state_names(writers):  # some are lost, and nothing tells how many there were
        writers = world_size
    lost = random_state_names(writers) - states
    if lost:
        return f"the random state ({min(lost)}) is missing"
    if writers == world_size:
        return None
    own = {SHARDED: "its own part of the optimizer", ROLLOUTS: "a rollout of its own"}
    held = next((words for patterns, words in own.items() if _has(folder, *patterns)), None)
    if held is None:
        return None  # the trainer knows whether anything is drawn in training
    return f"{writers} process(es) wrote it, each with {held}, and this run has {world_size}; start {writers}"


def writers_of(folder: Path) -> int:
    """How many processes wrote a checkpoint that is whole."""
    manifest = read_manifest(folder)
    if manifest is not None and manifest.processes is not None:
        return manifest.processes
    return len(list(folder.glob("rng_state*.pth"))) or 1


def random_state_names(world_size: int) -> set[str]:
    """What the Trainer calls the random states of so many processes."""
    return {"rng_state.pth"} if world_size == 1 else {f"rng_state_{rank}.pth" for rank in range(world_size)}


def broken(folder: Path, names: Iterable[str] | None = None) -> str | None:
    """The first file of `folder` that is not whole, judged by its structure; `names`: the files that are looked at."""
    paths = sorted(folder / name for name in (files_of(folder) if names is None else names))
    for path in [path for path in paths if path.suffix == ".json"]:
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            shards = set(content["weight_map"].values()) if path.name.endswith(".index.json") else set()
            _ = content["global_step"] if path.name == TRAINER_STATE_NAME else None
        except (ValueError, KeyError, TypeError, AttributeError):
            return f"{path.relative_to(folder)} is cut off or damaged"
        lost = sorted(shard for shard in shards if not (path.parent / shard).is_file())
        if lost:
            return f"the weights {lost[0]}, named by {path.name}, are missing"
    for path in paths:
        archive = path.suffix in ARCHIVES
        if (archive and not _archive_whole(path)) or (path.suffix == ".safetensors" and not _safetensors_whole(path)):
            return f"{path.relative_to(folder)} is cut off or damaged"
    for shards_folder in sorted([*folder.glob("pytorch_model_fsdp_*/"), *folder.glob("optimizer_*/")]):
        if shards_folder.is_dir() and not (shards_folder / ".metadata").is_file():
            return f"{shards_folder.name}/.metadata is missing"
    return None


def _changed(folder: Path, manifest: Manifest | None, *, quick: bool) -> str | None:
    if manifest is None:
        found = broken(folder)
        if found is None and not quick:
            logger.info("%s has no %s: the structure of its files was checked, not their bytes.", folder, MANIFEST)
        return found
    # Sizes first: they cost nothing, and nobody waits for hashes to learn that a file is empty.
    wrong = differences(folder, manifest.files, quick=True)
    if not wrong and not quick:
        wrong = differences(folder, manifest.files)
    return next(iter(wrong), None)


def _has(folder: Path, *patterns: str) -> bool:
    return any(next(folder.glob(pattern), None) for pattern in patterns)


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
    except (zipfile.BadZipFile, EOFError, ValueError, OSError, RuntimeError):
        return False  # RuntimeError: a flipped byte says that it is encrypted, or of a later format
    return True
