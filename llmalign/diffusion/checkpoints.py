"""What a run of a diffusers network leaves on the disk, and how it is read back."""

import logging
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.trainer import SCHEDULER_NAME

from llmalign.diffusion.denoiser import LORA_FILE, POLICY, Denoiser
from llmalign.diffusion.pipelines import load_pipeline
from llmalign.diffusion.sharding import whole_state, write_state
from llmalign.errors import UserError
from llmalign.trainers.safe_run import SafeRunMixin

logger = logging.getLogger(__name__)

ADAPTERS = "adapters"


class DenoiserCheckpoints(SafeRunMixin):
    """Checkpoints of a Denoiser: LoRA files of plain diffusers, or the network in a folder as a pipeline has it.

    Under LoRA the adapters alone are written, in checkpoints the frozen ones, too, each in a folder of its name. The
    output folder of a full fine-tuning ends as an ordinary pipeline. Sharded weights are made whole on their way to the
    disk, one after another; what DeepSpeed and FSDP2 write beside them is the optimizer's.
    """

    model: Denoiser
    pipeline_class: Any
    #: where the pipeline can be loaded from again, and what could not be: components of one that was made in memory
    start: str | None
    revision: str | None
    kept: dict[str, Any]

    @property
    def shards_weights(self) -> bool:
        """Whether each process holds a part of the weights, so that all of them take part in every use of one."""
        plugin = self.accelerator.state.deepspeed_plugin
        return self.is_fsdp_enabled or (plugin is not None and plugin.zero_stage == 3)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the trained weights, in the form that the class describes; all processes call it together."""
        if self.shards_weights:
            self._gathered = self._gather(Path(output_dir or self.args.output_dir))
        try:
            self._save(output_dir)
        finally:
            self._gathered = {}
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    #: what of a sharded model is about to be written: the states of its adapters by their names, or of its network
    _gathered: dict[str, dict[str, Tensor]] = {}  # noqa: RUF012

    def _gather(self, folder: Path) -> dict[str, dict[str, Tensor]]:
        denoiser = self.accelerator.unwrap_model(self.model)
        if not denoiser.has_adapters:
            return {denoiser.family.network_name: whole_state(denoiser.network, keep=self.args.should_save)}
        names = [POLICY, *(self.frozen_adapters if folder != Path(self.args.output_dir) else ())]
        return {name: denoiser.adapter_state(name) for name in names}

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        folder = Path(output_dir if output_dir is not None else self.args.output_dir)
        if not self.args.should_save:
            return
        folder.mkdir(parents=True, exist_ok=True)
        denoiser = self.accelerator.unwrap_model(self.model)
        if denoiser.has_adapters:
            denoiser.save_adapter(self.pipeline_class, folder, state=self._gathered.get(POLICY))
            for name in self.frozen_adapters if folder != Path(self.args.output_dir) else ():
                denoiser.save_adapter(self.pipeline_class, folder / ADAPTERS / name, name, self._gathered.get(name))
        elif folder == Path(self.args.output_dir):
            self.whole_pipeline(denoiser).save_pretrained(folder)
        else:
            self._whole_network(denoiser).save_pretrained(folder / denoiser.family.network_name)
        if folder == Path(self.args.output_dir):
            self.create_model_card()

    @property
    def frozen_adapters(self) -> list[str]:
        """Adapters that training reads and does not change, and that no other file holds."""
        return [name for name in self.accelerator.unwrap_model(self.model).adapters if name != POLICY]

    def whole_pipeline(self, denoiser: Denoiser) -> Any:
        """The pipeline that training started from, with the trained network in it."""
        part = {denoiser.family.network_name: self._whole_network(denoiser)}
        if self.start is None:
            return self.pipeline_class(**self.kept, **part)
        pipe = load_pipeline(self.start, revision=self.revision)
        pipe.register_modules(**part)
        return pipe

    def _whole_network(self, denoiser: Denoiser) -> Any:
        """The trained network, or where its weights are sharded another one with what was gathered of them."""
        state = self._gathered.get(denoiser.family.network_name)
        if state is None:
            return denoiser.network
        with torch.device("meta"):
            network = denoiser.network_class.from_config(denoiser.network.config)
        network.load_state_dict(state, assign=True)
        return network

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """See Trainer; the weights lie beside it, so that of those DeepSpeed writes what it trains, and FSDP2 none."""
        if self.is_deepspeed_enabled:
            self.model_wrapped.save_checkpoint(output_dir, exclude_frozen_parameters=True)
        elif self.is_fsdp_enabled:
            from accelerate.utils import save_fsdp_optimizer

            plugin = self.accelerator.state.fsdp_plugin
            save_fsdp_optimizer(plugin, self.accelerator, self.optimizer, self.model, output_dir)
        else:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        if self.args.should_save:
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER_NAME)

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: str | None) -> Any:
        """See Trainer; weights are read before an engine takes them, and with them what the engine's file lacks."""
        if resume_from_checkpoint is None or not (self.is_deepspeed_enabled or self.is_fsdp_enabled):
            return super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        self._load_from_checkpoint(resume_from_checkpoint)
        prepared = super()._prepare_for_training(max_steps, train_dataloader, None)
        if self.is_deepspeed_enabled:
            self.model_wrapped.load_checkpoint(resume_from_checkpoint, load_module_strict=False)
        self._load_optimizer_and_scheduler(resume_from_checkpoint)
        return prepared

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        folder = Path(resume_from_checkpoint)
        denoiser = self.accelerator.unwrap_model(model or self.model)
        if not denoiser.has_adapters:
            part = folder / denoiser.family.network_name
            if not part.is_dir():
                raise UserError(f"{folder} holds no weights of the {part.name}; resume with the recipe that wrote it")
            write_state(denoiser.network, denoiser.network_class.from_pretrained(part).state_dict())
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
