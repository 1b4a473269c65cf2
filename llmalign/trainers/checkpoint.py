"""Checkpoints that are whole or not there.

A checkpoint is written under `<output_dir>/_incomplete/` and renamed into place once every byte of it is on the disk:
a run that is killed at any moment leaves only whole ones behind. Its manifest tells the size and the hash of each file.
What is resumed from is checked first, because the Trainer itself goes on without a missing optimizer, scheduler or
random state and ends at other weights.
"""

import os
import shutil
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedModel, Trainer
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from llmalign.secrets import hidden
from llmalign.trainers.manifest import files_of, to_disk, write_manifest
from llmalign.trainers.resuming import ASIDE, check_whole, resolve_resume
from llmalign.trainers.sharding import engine_of
from llmalign.trainers.soundness import checkpoints, step_of, writers_of
from llmalign.trainers.splits import check_split, draw_anew

_SECRETS = ("hub_token", "model_init_kwargs")


class SafeCheckpointMixin(Trainer):
    """Makes any `transformers.Trainer` write checkpoints aside and rename them, and refuse a broken one to resume from.

    Put it before the trainer in the bases. Rotation and the push to the Hub happen after the rename. Several machines
    need one folder that all of them see. Not covered: `save_on_each_node`, SageMaker and XLA.
    """

    _writing_aside: bool = False
    #: the last step of which this run has saved all that it takes to go on
    saved_step: int | None = None

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Train, or go on from a checkpoint after checking that it is whole; `True` is the newest whole one.

        A checkpoint of another number of processes is gone on from where the rows of each step and the random draws
        stay what they were.

        Raises:
            UserError: the checkpoint lacks something that the rest of the run depends on.
        """
        if resume_from_checkpoint is True:
            resume_from_checkpoint = resolve_resume("auto", self.args.output_dir, self.args.world_size)
        elif resume_from_checkpoint:
            check_whole(resume_from_checkpoint, self.args.world_size)
        if resume_from_checkpoint:
            check_split(self, Path(resume_from_checkpoint))
        return super().train(resume_from_checkpoint or None, *args, **kwargs)

    def _run_epoch(self, **options: Any) -> None:
        # Gone on from its last step, the Trainer would take another one before it looks at their number.
        if self.state.global_step < self.state.max_steps:
            super()._run_epoch(**options)
        else:
            self.control.should_training_stop = True

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is not None and writers_of(Path(checkpoint)) != self.args.world_size:
            draw_anew(self)
        else:
            super()._load_rng_state(checkpoint)

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        # Of weights that are tied one is saved, and loading it has filled the others.
        tied = self.model.all_tied_weights_keys if isinstance(self.model, PreTrainedModel) else {}
        missing = [name for name in load_result.missing_keys if name not in tied]
        super()._issue_warnings_after_load(type(load_result)(missing, load_result.unexpected_keys))

    def _get_output_dir(self, trial: Any) -> str:
        run_dir = super()._get_output_dir(trial)
        return os.path.join(run_dir, ASIDE) if self._writing_aside else run_dir

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        kept = {name: getattr(self.args, name) for name in _SECRETS if name in vars(self.args)}
        for name, value in kept.items():  # training_args.bin would hold them
            setattr(self.args, name, None if name == "hub_token" else hidden(value))
        try:
            super()._save(output_dir, state_dict)
        finally:
            for name, value in kept.items():
                setattr(self.args, name, value)

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
            rows = self._train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
            about = {"step": self.state.global_step, "processes": self.args.world_size, "rows_per_step": rows}
            about["engine"] = engine_of(self)
            write_manifest(aside, files_of(aside), **about)
            _publish(aside, final)
        self.accelerator.wait_for_everyone()
        if not self.args.save_only_model:
            self.saved_step = self.state.global_step
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(final))
        if self.args.should_save:
            _rotate(run_dir, final, self.args.save_total_limit, self.state.best_model_checkpoint)


def _publish(aside: Path, final: Path) -> None:
    """Bring `aside` to the disk wholly, then rename it to `final`, in place of a checkpoint of the same step."""
    for folder, _, files in os.walk(aside):
        for file in files:
            to_disk(Path(folder) / file)
        to_disk(Path(folder))
    if final.exists():
        os.rename(final, aside.parent / f"replaced-{final.name}")
    os.rename(aside, final)
    to_disk(final.parent)
    shutil.rmtree(aside.parent)


def _rotate(run_dir: Path, newest: Path, limit: int | None, best: str | None) -> None:
    """Keep `limit` checkpoints, `newest` and `best` always among them; each other one leaves in a single rename.

    The Trainer's own rotation takes the highest step for the newest: after going back behind a broken checkpoint it
    would keep that one and delete what was just saved. Steps beyond `newest` go first here.
    """
    if limit is None or limit <= 0:
        return
    kept = {newest.name} | ({Path(best).name} if best is not None else set())
    others = [folder for folder in checkpoints(run_dir) if folder.name not in kept]
    others.sort(key=lambda folder: (step_of(folder) < step_of(newest), step_of(folder)))
    for folder in others[: max(0, len(others) + len(kept) - limit)]:
        doomed = run_dir / ASIDE / folder.name
        doomed.parent.mkdir(exist_ok=True)
        os.rename(folder, doomed)
        shutil.rmtree(doomed.parent)
