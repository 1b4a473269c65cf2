"""What a run of a diffusers network leaves on the disk, and how it is read back."""

import logging
from pathlib import Path
from typing import Any

from torch import nn

from llmalign.diffusion.denoiser import LORA_FILE, POLICY, Denoiser
from llmalign.diffusion.pipelines import load_pipeline
from llmalign.errors import UserError
from llmalign.trainers.checkpoint import SafeCheckpointMixin

logger = logging.getLogger(__name__)

ADAPTERS = "adapters"


class DenoiserCheckpoints(SafeCheckpointMixin):
    """Checkpoints of a Denoiser: LoRA files of plain diffusers, or the network in a folder as a pipeline has it.

    Under LoRA the adapters alone are written, in checkpoints the frozen ones, too, each in a folder of its name. The
    output folder of a full fine-tuning ends as an ordinary pipeline.
    """

    model: Denoiser
    pipeline_class: Any
    #: where the pipeline can be loaded from again, and what could not be: components of one that was made in memory
    start: str | None
    revision: str | None
    kept: dict[str, Any]

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        folder = Path(output_dir if output_dir is not None else self.args.output_dir)
        if not self.args.should_save:
            return
        folder.mkdir(parents=True, exist_ok=True)
        denoiser = self.accelerator.unwrap_model(self.model)
        if denoiser.has_adapters:
            denoiser.save_adapter(self.pipeline_class, folder)
            for name in self.frozen_adapters if folder != Path(self.args.output_dir) else ():
                denoiser.save_adapter(self.pipeline_class, folder / ADAPTERS / name, name)
        elif folder == Path(self.args.output_dir):
            self.whole_pipeline(denoiser).save_pretrained(folder)
        else:
            denoiser.network.save_pretrained(folder / denoiser.family.network_name)
        if folder == Path(self.args.output_dir):
            self.create_model_card()

    @property
    def frozen_adapters(self) -> list[str]:
        """Adapters that training reads and does not change, and that no other file holds."""
        return [name for name in self.accelerator.unwrap_model(self.model).adapters if name != POLICY]

    def whole_pipeline(self, denoiser: Denoiser) -> Any:
        """The pipeline that training started from, with the trained network in it."""
        part = {denoiser.family.network_name: denoiser.network}
        if self.start is None:
            return self.pipeline_class(**self.kept, **part)
        pipe = load_pipeline(self.start, revision=self.revision)
        pipe.register_modules(**part)
        return pipe

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        folder = Path(resume_from_checkpoint)
        denoiser = self.accelerator.unwrap_model(model or self.model)
        if not denoiser.has_adapters:
            part = folder / denoiser.family.network_name
            if not part.is_dir():
                raise UserError(f"{folder} holds no weights of the {part.name}; resume with the recipe that wrote it")
            read = type(denoiser.network).from_pretrained(part)
            denoiser.network.load_state_dict(read.state_dict())
            return
        if not (folder / LORA_FILE).is_file():
            raise UserError(f"{folder} holds no {LORA_FILE}; resume with the recipe that wrote it")
        self.restore_frozen(denoiser, folder / ADAPTERS)
        denoiser.restore_adapter(self.pipeline_class, folder)

    def restore_frozen(self, denoiser: Denoiser, folder: Path) -> None:
        """Read back the frozen adapters that a checkpoint holds, adding those that are not there yet."""
        for part in sorted(folder.glob("*/")):
            if part.name not in denoiser.adapters:
                denoiser.add_copy(part.name)
            denoiser.restore_adapter(self.pipeline_class, part, part.name)

    def _load_best_model(self) -> None:
        best = self.state.best_model_checkpoint
        logger.info("The best checkpoint is %s.", best)
        self._load_from_checkpoint(best)
