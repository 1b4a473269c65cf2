"""The moments of a run on images: what is held while pictures are encoded and drawn, and while a step is trained."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn
from transformers.training_args import OptimizerNames

from llmalign.diffusion.embedded import pipeline_path
from llmalign.diffusion.online_configs import PREVIOUS, D3POConfig
from llmalign.diffusion.outline import PipelineOutline, pipeline_outline
from llmalign.diffusion.rollouts import guided
from llmalign.diffusion.scores import denoising_errors
from llmalign.diffusion.seppo import SePPOConfig
from llmalign.errors import UserError
from llmalign.image_work import image_work
from llmalign.plan.facts import UNKNOWN_OPTIMIZER, Target, precision
from llmalign.plan.memory import optimizer_state
from llmalign.plan.outline import Weights
from llmalign.plan.rows import steps_of
from llmalign.plan.sharding import SHARDED, Device, Held, spread
from llmalign.plan.text import SAMPLING, STEPPING, TRAINING
from llmalign.plan.trace import LOSS, REFERENCE, Ledger, Peak, largest, traced, weightless, without_numbers
from llmalign.recipe import Recipe
from llmalign.trainers.loading import ModelConfig

ENCODING = "encoding the pictures"


@dataclass
class ImagePlan:
    """The memory of one run on images, batch by batch."""

    recipe: Recipe
    config: Any
    target: Target
    bf16: bool
    checkpointing: bool
    outline: PipelineOutline
    options: ModelConfig
    rows: int
    notes: list[str] = field(default_factory=list)
    partial = False
    _known: dict[Any, Peak] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.online = isinstance(self.config, D3POConfig)
        self.resolution = self.config.resolution or self.outline.native_resolution
        if not self.resolution:
            raise UserError("the pipeline does not say which size it was made for: set resolution, in pixels")
        denoiser = self.outline.denoiser(self.lora)
        trained = [weight for weight in denoiser.parameters() if weight.requires_grad]
        self.count = sum(map(torch.numel, denoiser.parameters()))
        units = [part for part in denoiser.modules() if type(part).__name__ in denoiser._no_split_modules]
        sizes = [sum(map(torch.numel, part.parameters())) for part in units]
        self.weights = Weights(
            count=self.count,
            trained=sum(map(torch.numel, trained)),
            bytes=float(sum(weight.numel() * weight.itemsize for weight in denoiser.parameters())),
            trained_bytes=float(sum(weight.numel() * weight.itemsize for weight in trained)),
            largest_layer=max(sizes, default=0),
            outside=max(self.count - sum(sizes), 0),
        )
        optimizer = OptimizerNames(self.optimizer).value
        state = optimizer_state(optimizer, [tuple(weight.shape) for weight in trained])
        if state is None:
            self.notes.append(UNKNOWN_OPTIMIZER.format(optimizer))
        self.state = state or 0.0
        self.vae_numbers = sum(map(torch.numel, self.outline.vae().parameters()))

    @property
    def optimizer(self) -> Any:
        """As the config names it."""
        return self.config.optim

    @property
    def lora(self) -> tuple[int, int, Any] | None:
        """Rank, alpha and targets of the adapter."""
        options = self.options
        return (options.lora_r, options.lora_alpha, options.lora_target_modules) if options.use_peft else None

    def held(self) -> Held:
        """What a run holds beside its passes: a frozen copy of the network, and the autoencoder where it draws."""
        frozen = {}
        adapter = self.lora is not None or self.config.start_adapter is not None
        explicit = not self.online and self.config.ref_model_name_or_path is not None
        plain = Weights(self.count, 0, float(self.count * self.outline.dtype.itemsize), 0.0)
        if not adapter or explicit:
            frozen["reference"] = plain
        if self.online:
            frozen["autoencoder"] = Weights(self.vae_numbers, 0, self.vae_numbers * 4.0, 0.0)
        return Held(self.weights, self.state, self.bf16, frozen)

    def floor(self, config: str) -> float:
        """Bytes of a device without any pass."""
        return spread(config, self.target.devices, self.held(), Peak(), cuda=self.target.cuda).total

    def device(self, config: str, size: int, accumulation: int, *, checkpointing: bool) -> tuple[Device, str]:
        """The worst moment on one device, and its name."""
        devices, cuda = self.target.devices, self.target.cuda
        held = self.held()
        engine = config in SHARDED and self.bf16
        peak = self.train(size, checkpointing=checkpointing, gradients=accumulation > 1, engine=engine)
        found = {TRAINING: spread(config, devices, held, peak, cuda=cuda)}
        gradients = Peak(gradients=self.weights.trained_bytes)
        found[STEPPING] = spread(config, devices, held, gradients, cuda=cuda)
        if self.online:
            found[SAMPLING] = spread(config, devices, held, self.draw(), cuda=cuda)
        else:
            before = replace(held, state=0.0, frozen={}, weights=replace(self.weights, bytes=self.count * 4.0))
            encoding = spread(config, devices, before, self.encode(), cuda=cuda)
            encoding.parts["autoencoder"] = self.vae_numbers * 4.0
            encoding.parts["text encoders"] = sum(self.outline.parts.values()) * float(self.outline.dtype.itemsize)
            encoding.parts["weights"] = self.count * float(self.outline.dtype.itemsize)
            found[ENCODING] = encoding
        name = max(found, key=lambda each: found[each].total)
        return found[name], name

    def train(self, size: int, *, checkpointing: bool, gradients: bool, engine: bool = False) -> Peak:
        """Of a training pass over `size` rows, two pictures each; `engine`: its weights are in bfloat16."""
        rows = 2 * size
        scale = self.config.guidance_scale if self.online else 1.0
        frozen = not (self.online and self.config.reference == PREVIOUS)

        def make(denoiser: Any) -> Callable[[Ledger], None]:
            noisy, conditions = self.outline.latents(rows, self.resolution), self.outline.conditions(rows)
            empty = self.outline.conditions(1)
            target, times = torch.zeros_like(noisy), torch.zeros(rows, dtype=torch.long)

            def forward() -> torch.Tensor:
                with torch.autocast("cpu", torch.bfloat16, enabled=self.bf16 and not engine):
                    prediction = guided(denoiser, empty, scale)(noisy, times, conditions)
                return denoising_errors(prediction, target)

            def step(ledger: Ledger) -> None:
                if frozen and not self.online:  # before the policy, as its trainer does
                    with torch.no_grad():
                        forward()
                elif frozen:
                    ledger.enter(REFERENCE)
                    with torch.no_grad():
                        forward()
                loss = forward().sum()
                ledger.enter(LOSS)
                loss.backward()

            return step

        return self._traced(("train", size, checkpointing, gradients, engine), make, checkpointing, gradients, engine)

    def draw(self) -> Peak:
        """Of drawing `sampling_batch_size` pictures, and of decoding `encode_batch_size` of them."""
        count, decoded = max(self.config.sampling_batch_size // 2, 1) * 2, self.config.encode_batch_size

        def make(denoiser: Any) -> Callable[[Ledger], None]:
            noisy, conditions = self.outline.latents(count, self.resolution), self.outline.conditions(count)
            empty, times = self.outline.conditions(1), torch.zeros(count, dtype=torch.long)
            vae: Any = weightless(self.outline.vae()).requires_grad_(False)

            def step(ledger: Ledger) -> None:
                ledger.know(vae)
                with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=self.bf16):
                    guided(denoiser, empty, self.config.guidance_scale)(noisy, times, conditions)
                ledger.enter(REFERENCE)
                with torch.no_grad():
                    vae.decode(self.outline.latents(min(decoded, count), self.resolution), return_dict=False)

            return step

        return self._traced(("draw",), make, False, False)

    def encode(self) -> Peak:
        """Of encoding `encode_batch_size` pictures, in float32."""

        def make(_: Any) -> Callable[[Ledger], None]:
            vae: Any = weightless(self.outline.vae()).requires_grad_(False)

            def step(ledger: Ledger) -> None:
                ledger.know(vae)
                with torch.no_grad():
                    vae.encode(torch.zeros(self.config.encode_batch_size, 3, self.resolution, self.resolution))

            return step

        return self._traced(("encode",), make, False, False)

    def _traced(
        self,
        key: Any,
        make: Callable[[Any], Callable[[Ledger], None]],
        checkpointing: bool,
        gradients: bool,
        engine: bool = False,
    ) -> Peak:
        if key not in self._known:
            outline = replace(self.outline, dtype=torch.bfloat16) if engine else self.outline
            denoiser: nn.Module = outline.denoiser(self.lora)
            if checkpointing:
                denoiser.activation_checkpointing_enable()  # type: ignore[operator]
            with without_numbers():
                denoiser = weightless(denoiser)
                self._known[key] = largest(list(traced(denoiser, make(denoiser), gradients=gradients).values()))
        return self._known[key]

    @property
    def rows_of_run(self) -> int:
        """Rows of an epoch; those of all rounds, where pictures are drawn."""
        args = self.config
        if not self.online:
            return self.rows
        kept = max(1, round(args.timestep_fraction * self.outline.stochastic_steps(args, self.resolution)))
        return int(args.rounds * args.pairs_per_round * kept * args.inner_epochs)

    def steps(self, size: int, accumulation: int) -> int:
        """Optimizer steps of the run with this batch on each device."""
        args = self.config
        epochs = 1.0 if self.online else args.num_train_epochs
        return steps_of(self.rows_of_run, size, accumulation, self.target.devices, epochs, args.max_steps)

    def epochs(self, rows: int) -> float:
        """Passes over the rows of the run in which so many are trained on."""
        if self.config.max_steps <= 0:
            return 1.0 if self.online else self.config.num_train_epochs
        return rows / max(self.rows_of_run, 1)


def image_plan(recipe: Recipe, target: Target, rows: int | None) -> ImagePlan:
    """Read a recipe of images; `rows` takes the place of reading its data."""
    config = recipe.training_config()
    bf16, checkpointing = precision(recipe, config, target)
    options = recipe.model_config()
    path = pipeline_path(str(options.model_name_or_path))
    outline = pipeline_outline(path, revision=options.model_revision, dtype=options.dtype)
    notes = list(_unmodelled(config))
    if rows is None:
        rows = len(image_work(recipe, config, options).data.train)
    else:
        notes.append(f"{rows:,} rows were taken for the data, which were not read")
    return ImagePlan(recipe, config, target, bf16, checkpointing, outline, options, rows, notes)


def _unmodelled(config: Any) -> Iterator[str]:
    if isinstance(config, D3POConfig):
        yield "not modelled: what reward functions hold (a CLIP model, where one judges) and how long they take"
    elif isinstance(config, SePPOConfig):
        yield "not modelled: sampling the other side from past checkpoints, and their adapters"
    yield "pictures and captions that were encoded are read from the disk, batch by batch, and not counted"
