"""An output folder keeps to one run: the recipe that it was started with, and what may change when it goes on."""

import json
import logging
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from llmalign.errors import UserError
from llmalign.processes import fail_together
from llmalign.secrets import hidden
from llmalign.trainers.manifest import to_disk
from llmalign.trainers.resuming import ASIDE
from llmalign.trainers.soundness import checkpoints

logger = logging.getLogger(__name__)

RUN_FILE = "run.json"

# Recipe keys that may change between the start of a run and its resumption: none of them reaches the weights.
HARMLESS_KEYS = frozenset(
    """
    output_dir resume save_total_limit per_device_eval_batch_size eval_accumulation_steps dataloader_pin_memory
    logging_dir logging_first_step logging_steps logging_strategy log_level log_level_replica disable_tqdm
    report_to run_name project trackio_space_id non_finite alarm_chosen_drop alarm_prompts alarm_new_tokens
    reference_cache_dir image_cache_dir encode_batch_size save_only_model
    activation_checkpointing gradient_checkpointing
    push_to_hub hub_model_id hub_strategy hub_token hub_private_repo hub_always_push hub_revision
    """.split()
)
SECRET_KEYS = frozenset({"hub_token"})
# Their product is the rows of a step, and how a step is split decides nothing where its rows stay.
SPLIT_KEYS = ("world_size", "per_device_train_batch_size", "gradient_accumulation_steps")


def guard_output_dir(
    output_dir: str | Path,
    resume: str | None,
    fingerprint: Mapping[str, Any],
    harmless: Iterable[str] = HARMLESS_KEYS,
    *,
    any_split: bool = False,
) -> None:
    """Refuse an output folder that holds another run; writes nothing (see `record_run`), looks on rank 0 alone.

    All processes call it together, and all end where it is refused.

    Without `resume` the folder must hold no run at all. With it, `fingerprint` (the resolved recipe) must equal the one
    that the run was started with, except for `harmless` keys and, with `any_split`, for how processes and micro-batches
    share the rows of a step.

    Raises:
        UserError: another run is there, or the recipe changed in a key that changes the result (named, old -> new).
    """
    fault = None
    if int(os.environ.get("RANK", "0")) == 0:
        try:
            _guard(Path(output_dir).resolve(), resume, fingerprint, frozenset(harmless), any_split=any_split)
        except UserError as error:
            fault = str(error)
    fail_together(fault)


def _guard(
    folder: Path, resume: str | None, fingerprint: Mapping[str, Any], harmless: frozenset[str], *, any_split: bool
) -> None:
    # A checkpoint of another folder brings its own run file; the output folder must then be free.
    home = folder if resume is None or resume == "auto" else Path(resume).resolve().parent
    found = traces(folder)
    if found and (resume is None or home != folder):
        raise UserError(
            f"output_dir {folder} holds another run ({found[0]}); "
            "go on with it by --resume auto, or give a new output_dir."
        )
    if resume is None or not set(traces(home)) - {ASIDE, RUN_FILE}:
        return
    if (home / RUN_FILE).exists():
        compare_recipes(home / RUN_FILE, fingerprint, harmless, any_split=any_split)
    elif checkpoints(home):
        logger.warning("%s has no %s, so its recipe cannot be compared with this one.", home, RUN_FILE)
    else:
        strange = traces(home)[0]
        raise UserError(f"output_dir {folder} holds weights of another origin ({strange}); give a new output_dir.")


def record_run(output_dir: str | Path, fingerprint: Mapping[str, Any]) -> None:
    """Write the resolved recipe to `<output_dir>/run.json`, atomically and without secrets, on rank 0 alone."""
    if int(os.environ.get("RANK", "0")) != 0:
        return
    folder = Path(output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f"{RUN_FILE}.tmp"
    temporary.write_text(json.dumps(as_plain(fingerprint), indent=2, sort_keys=True) + "\n", encoding="utf-8")
    to_disk(temporary)
    os.replace(temporary, folder / RUN_FILE)
    to_disk(folder)


def as_plain(fingerprint: Mapping[str, Any]) -> dict[str, Any]:
    """The resolved recipe as JSON holds it, without secrets."""
    public = {key: value for key, value in fingerprint.items() if key not in SECRET_KEYS}
    plain: dict[str, Any] = hidden(json.loads(json.dumps(public, default=str)))
    return plain


def compare_recipes(
    run_file: Path, fingerprint: Mapping[str, Any], harmless: frozenset[str], *, any_split: bool = False
) -> None:
    """Raise UserError where the resolved recipe in `run_file` differs in more than `harmless` keys.

    With `any_split` processes and batch sizes may differ whose product, the rows of a step, is the same.
    """
    try:
        before = json.loads(run_file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{run_file} is not readable as JSON ({error}); start again in a new output_dir.") from error
    now = as_plain(fingerprint)
    if any_split and all(key in before and key in now for key in SPLIT_KEYS):
        _refuse_other_rows(run_file, before, now)
        harmless = harmless.union(SPLIT_KEYS)
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


def _refuse_other_rows(run_file: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    rows, own = (math.prod(recipe[key] for key in SPLIT_KEYS) for recipe in (before, now))
    if rows == own:
        return
    said, own_said = (
        "{} process(es) x {} x {} accumulated".format(*(recipe[key] for key in SPLIT_KEYS)) for recipe in (before, now)
    )
    raise UserError(
        f"The run in {run_file.parent} takes {rows} rows a step ({said}) and this recipe {own} ({own_said}): start as "
        "many processes as before (under ZeRO and FSDP no other number goes on), or choose per_device_train_batch_size "
        f"and gradient_accumulation_steps so that their product with the processes is {rows} again, or give a new "
        "output_dir."
    )


def traces(folder: Path) -> list[str]:
    """Names in `folder` that only a run leaves there, checkpoints first."""
    weights = ("model*.safetensors", "adapter_model.*", "pytorch_model*.bin", "pytorch_lora_weights.*")
    patterns = (f"{PREFIX_CHECKPOINT_DIR}-*", *weights, "model_index.json", ASIDE)
    found = [path.name for pattern in patterns for path in sorted(folder.glob(pattern))]
    return found + [RUN_FILE] * (folder / RUN_FILE).exists()
