"""What trainers of image models share: the pipeline taken apart, its data encoded, its encoders dropped."""

import copy
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import send_to_device
from datasets import Dataset
from peft import LoraConfig
from torch import nn

from llmalign.assets import cache_folder
from llmalign.diffusion.card import write_card
from llmalign.diffusion.checkpoints import DenoiserCheckpoints
from llmalign.diffusion.configs import ImageConfig
from llmalign.diffusion.denoiser import POLICY, Denoiser
from llmalign.diffusion.latents import LatentCollator, LatentRows, encode
from llmalign.diffusion.monitor import Monitor
from llmalign.diffusion.pipelines import family_of, load_pipeline
from llmalign.diffusion.process import process_of
from llmalign.diffusion.sharding import freeze_beside, loading_whole
from llmalign.errors import UserError
from llmalign.trainers.pair import PairTrainerMixin
from llmalign.trainers.startup import refuse_adapter_dropout
from llmalign.trainers.step_rows import rows_of
from llmalign.trainers.validation import require

logger = logging.getLogger(__name__)

TRAIN = "train"


class ImageTrainer(DenoiserCheckpoints, PairTrainerMixin, Monitor):
    """A Trainer of the network of a diffusers pipeline, given by its path or as an object, with or without LoRA.

    `train_dataset` and `eval_dataset` (one, or several by name) hold rows as `llmalign.data.images` makes them; they
    are encoded here, once, and what encoded them leaves memory. Under LoRA the reference is the network with its
    adapters off, or the frozen copy of `args.start_adapter`; else it is a frozen copy of the network.
    """

    args: Any
    #: columns of the rows that hold pictures
    images: tuple[str, ...]
    #: whether pictures are decoded during training
    keeps_vae = False
    start_tolerance = 1e-5  # beta in the thousands multiplies it
    score_unit = ""  # half a denoising error, or a log-ratio a latent dimension

    def __init__(
        self,
        model: Any,
        args: ImageConfig | None = None,
        train_dataset: Dataset | None = None,
        eval_dataset: Dataset | dict[str, Dataset] | None = None,
        *,
        ref_model: Any = None,
        peft_config: LoraConfig | None = None,
        revision: str | None = None,
        dtype: str | None = None,
        **kwargs: Any,
    ) -> None:
        if args is None or train_dataset is None:
            raise UserError(f"{type(self).__name__} needs its config as `args`, and a train_dataset")
        refuse_adapter_dropout(peft_config)
        with loading_whole():
            pipe = load_pipeline(model, revision=revision, dtype=dtype) if isinstance(model, (str, Path)) else model
        self.start, self.revision = (str(model), revision) if isinstance(model, (str, Path)) else (None, None)
        self.pipeline_class = type(pipe)
        self.family = family_of(pipe, guidance=args.guidance_embedding)
        self.process = process_of(pipe.scheduler)
        self.scheduler_config = dict(pipe.scheduler.config)
        self.resolution = args.resolution or _native_resolution(pipe, self.family)
        side = self.family.vae_scale_factor * self.family.patch
        rule = f"a multiple of {side} for {type(pipe).__name__}"
        require(self.resolution % side == 0, "resolution", self.resolution, rule)
        self.latents = self._encoded(pipe, args, train_dataset, eval_dataset)
        self.unconditional = self._encode_unconditional(pipe)
        network = pipe.components[self.family.network_name]
        denoiser = Denoiser(network.requires_grad_(True), self.family)
        if denoiser.adapters:
            raise UserError(f"the pipeline has adapters already ({', '.join(denoiser.adapters)}): fuse or unload them")
        self.reference: Denoiser | None = None
        self.reference_adapter: str | None = None
        self._add_adapters(pipe, denoiser, args, peft_config)
        if not denoiser.has_adapters or ref_model is not None:
            self.reference = self._frozen_reference(denoiser, ref_model, dtype)
        self.start_may_differ = "another reference was given" if ref_model is not None else None
        self.vae = pipe.vae if self.keeps_vae else None
        self._drop_encoders(pipe)
        on_cuda = args.device.type == "cuda"  # a CPU's convolutions gain nothing by it, and its fused AdamW loses
        if args.channels_last or (args.channels_last is None and on_cuda and self.family.network_name == "unet"):
            for each in (denoiser, self.reference):
                if each is not None:
                    each.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        sets = dict(self.latents.sets)
        train = sets.pop(TRAIN)
        super().__init__(
            model=denoiser,
            args=args,
            train_dataset=train,
            eval_dataset=sets if isinstance(eval_dataset, dict) else sets.get("eval"),
            data_collator=LatentCollator(self.latents, self.images),
            **kwargs,
        )
        if self.reference is not None:
            self._frozen_engine = freeze_beside(self.reference, self.accelerator)
        if self.vae is not None:
            self.vae.to(self.args.device)

    def _encoded(self, pipe: Any, args: ImageConfig, train: Dataset, evaluation: Any) -> LatentRows:
        named = evaluation if isinstance(evaluation, dict) else {} if evaluation is None else {"eval": evaluation}
        if TRAIN in named:
            raise UserError("an evaluation set cannot be called `train`: give it another name")
        folder = Path(args.image_cache_dir).expanduser() if args.image_cache_dir else cache_folder() / "images"
        return encode(
            {TRAIN: train, **named},
            pipe,
            self.family,
            images=self.images,
            resolution=self.resolution,
            flips=self.flips(args),
            folder=folder,
            device=args.device,
            batch_size=args.encode_batch_size,
        )

    def rows_in_words(self, inputs: Mapping[str, Any]) -> list[dict[str, Any]]:
        """See FiniteStepsMixin; what an image row says is its caption."""
        captions = [self.latents.texts[place] for place in inputs["caption_id"].tolist()]
        return rows_of(inputs, None, self.train_dataset, self.args, captions)

    def _prepare_input(self, data: Any) -> Any:
        """To the device alone: with DeepSpeed the Trainer would cast latents to the precision of the weights, too."""
        return send_to_device(data, self.args.device)

    def check_guidance(self) -> None:
        """Raise UserError where a network that is told its guidance would be guided a second time."""
        if self.family.guidance is not None and self.args.guidance_scale > 1:
            raise UserError(
                f"guidance_scale is {self.args.guidance_scale:g} and this network is told its guidance "
                f"({self.family.guidance:g}, guidance_embedding): set guidance_scale: 1"
            )

    def describe(self) -> str:
        """What is minimised, in words."""
        raise NotImplementedError

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write the page that goes to the Hub with the model; what the arguments would add is there already."""
        write_card(self, Path(self.args.output_dir))

    def flips(self, args: Any) -> bool:
        """Whether mirror images are encoded, too."""
        return False

    @torch.no_grad()
    def _encode_unconditional(self, pipe: Any) -> dict[str, torch.Tensor]:
        return {name: value.float().cpu() for name, value in self.family.unconditional(pipe).items()}

    def _add_adapters(self, pipe: Any, denoiser: Denoiser, args: ImageConfig, peft_config: Any) -> None:
        if args.start_adapter is not None:
            denoiser.load_adapter(pipe, args.start_adapter)
            _refuse_other_lora(peft_config, denoiser.network.peft_config[POLICY], args.start_adapter)
            self.reference_adapter = "ref"
            denoiser.add_copy(self.reference_adapter)
            logger.info("Training goes on from the adapter %s; a frozen copy of it is kept.", args.start_adapter)
        elif peft_config is not None:
            own = copy.deepcopy(peft_config)
            own.target_modules = peft_config.target_modules or set(self.family.lora_targets)
            own.lora_dropout = 0.0  # what was asked for explicitly has been refused
            denoiser.add_adapter(own)

    def _frozen_reference(self, denoiser: Denoiser, ref_model: Any, dtype: str | None) -> Denoiser:
        if ref_model is None:
            network: nn.Module = copy.deepcopy(denoiser.network)
        else:
            with loading_whole():
                pipe = load_pipeline(ref_model, dtype=dtype) if isinstance(ref_model, (str, Path)) else ref_model
            if type(pipe) is not self.pipeline_class:
                raise UserError(
                    f"the reference is a {type(pipe).__name__}, the policy a {self.pipeline_class.__name__}"
                )
            network = pipe.components[self.family.network_name]
        return Denoiser(network, self.family).requires_grad_(False).eval()

    def _drop_encoders(self, pipe: Any) -> None:
        """Let go of what training has no use for; of a pipeline made in memory it is kept aside, for the end."""
        part = self.family.network_name
        self.kept = (
            {name: value for name, value in pipe.components.items() if name != part} if self.start is None else {}
        )
        for value in self.kept.values():
            if isinstance(value, nn.Module):
                value.to("cpu")


def _refuse_other_lora(asked: Any, found: Any, path: str) -> None:
    """Raise UserError where a configuration is asked for that the adapter which training goes on from does not have."""
    names = [] if asked is None else ["r", "lora_alpha", *(["target_modules"] if asked.target_modules else [])]
    for name in names:
        wanted, own = getattr(asked, name), getattr(found, name)
        if wanted != own:
            raise UserError(f"start_adapter {path} has {name} {own}, and {wanted} is asked for: ask for its own")


def _native_resolution(pipe: Any, family: Any) -> int:
    """The side in pixels that a network was made for, by its own configuration."""
    size = pipe.components[family.network_name].config.get("sample_size")
    if not isinstance(size, int):
        raise UserError(f"{type(pipe).__name__} does not say which size it was made for: set resolution, in pixels")
    return size * family.vae_scale_factor


def lora_config(rank: int, alpha: int, targets: Sequence[str] | None = None, dropout: float = 0.0) -> LoraConfig:
    """LoRA as diffusers' own scripts set it up, its first factor gaussian; without targets: on the attention."""
    return LoraConfig(
        r=rank,
        lora_alpha=alpha,
        target_modules=None if targets is None else list(targets),
        lora_dropout=dropout,
        init_lora_weights="gaussian",
    )
