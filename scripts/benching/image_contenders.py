"""This project's image trainer, and a plain reading of the public scripts for Diffusion-DPO on SDXL.

Full fine-tuning is that of train.py of SalesforceAIResearch/DiffusionDPO: a second, frozen UNet is the reference, and
VAE and text encoders run in every step on what it is given. LoRA is that of diffusers' train_diffusion_dpo_sdxl.py,
whose reference is the same UNet with its adapters off. Both in float32 with PyTorch's AdamW, which the first replaces
by Adafactor for SDXL, and with draws that are given, for losses to be comparable.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from datasets import load_from_disk
from diffusers import AutoencoderKL, DDPMScheduler, DiffusionPipeline, UNet2DConditionModel
from peft import LoraConfig
from torch import Tensor, nn
from torch.nn.functional import logsigmoid
from transformers import PrinterCallback, TrainerCallback

from benching.image_cases import Job
from benching.images import ENCODED_AT_ONCE, size_of
from llmalign.data.images import decode, pixels
from llmalign.diffusion.configs import DiffusionPreferenceConfig
from llmalign.diffusion.noise import draw
from llmalign.diffusion.pipelines import ATTENTION
from llmalign.diffusion.trainer import SIDES, DiffusionPreferenceTrainer

BETA, LEARNING_RATE, WEIGHT_DECAY, MAX_NORM, RANK, SEED = 5000.0, 1e-5, 1e-2, 1.0, 8, 0
Step = tuple[float, float]  # loss and norm of the gradient


def lora() -> LoraConfig:
    """As diffusers' script has it."""
    return LoraConfig(r=RANK, lora_alpha=RANK, init_lora_weights="gaussian", target_modules=list(ATTENTION))


def trained(network: nn.Module) -> dict[str, nn.Parameter]:
    """The weights that are trained."""
    return {name: weight for name, weight in network.named_parameters() if weight.requires_grad}


def same_start(network: nn.Module) -> None:
    """Give adapters, which begin at random, weights that every process draws alike."""
    draws = torch.Generator().manual_seed(0)
    for name, weight in trained(network).items():
        if "lora_A" in name:
            nn.init.normal_(weight, std=1 / RANK, generator=draws)


class Script:
    """The scripts' step, and what they hold, on a pipeline's folder."""

    def __init__(self, job: Job) -> None:
        self.job, self.size = job, size_of(job)
        home = f"{job.folder}/pipe"
        self.pipe = DiffusionPipeline.from_pretrained(home) if job.encoders else None
        self.encoded = None if job.encoders else torch.load(f"{job.folder}/encoded.pt")
        self.scaling = AutoencoderKL.load_config(home, subfolder="vae")["scaling_factor"]
        self.noising = DDPMScheduler.from_pretrained(home, subfolder="scheduler")
        self.unet = self.pipe.unet if self.pipe else UNet2DConditionModel.from_pretrained(home, subfolder="unet")
        self.reference = None
        if job.trained != "lora":
            self.reference = UNet2DConditionModel.from_pretrained(home, subfolder="unet").requires_grad_(False)
        if job.trained != "full":
            self.unet.requires_grad_(False)
            self.unet.add_adapter(lora())
            same_start(self.unet)
        self.unet.train()
        if job.recompute:
            self.unet.enable_gradient_checkpointing()
        self.weights = list(trained(self.unet).values())
        self.optimizer = torch.optim.AdamW(self.weights, LEARNING_RATE, weight_decay=WEIGHT_DECAY)
        self.rows = load_from_disk(f"{job.folder}/rows")

    def batches(self) -> Iterator[dict[str, Any]]:
        """What each step is given: draws, and pictures and captions or what they were encoded to."""
        for first in range(0, len(self.rows), self.job.pairs):
            some = list(range(first, first + self.job.pairs))
            given = self.rows[some] if self.encoded is None else {name: all[some] for name, all in self.encoded.items()}
            yield given | {"draws": draw((SEED, "train", 0), some, self.size.latent_shape)}

    @torch.no_grad()
    def moments(self, batch: dict[str, Any]) -> Tensor:
        """Mean and deviation (2B, 2C, h, w) of the latents, winners first."""
        if self.pipe is None:
            return torch.cat([batch[side] for side in SIDES])
        pictures = torch.stack([pixels(decode(data), self.size.side) for side in SIDES for data in batch[side]])
        posterior = self.pipe.vae.encode(pictures).latent_dist
        return torch.cat([posterior.mean, posterior.std], dim=1)

    @torch.no_grad()
    def prompts(self, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """States (B, T, D) of both text encoders side by side, and the second one's pooled embedding."""
        pipe = self.pipe
        if pipe is None:
            return batch["states"], batch["pooled"]
        states = []
        for tokenizer, encoder in ((pipe.tokenizer, pipe.text_encoder), (pipe.tokenizer_2, pipe.text_encoder_2)):
            tokens = tokenizer(batch["caption"], padding="max_length", truncation=True, return_tensors="pt")
            output = encoder(tokens.input_ids, output_hidden_states=True)
            states.append(output.hidden_states[-2])
        return torch.cat(states, dim=-1), output[0]

    def loss(self, batch: dict[str, Any]) -> Tensor:
        """Mean of -log sigmoid(-beta/2 [(err_w - err_l) - (ref_err_w - ref_err_l)]), the policy first."""
        draws = batch["draws"]
        mean, deviation = self.moments(batch).chunk(2, dim=1)
        latents = (mean + deviation * torch.cat(draws.latent.unbind(1))) * self.scaling
        noise = torch.cat(draws.noise.unbind(1))
        timesteps = (draws.time.double() * self.noising.config.num_train_timesteps).long().repeat(2)
        noisy = self.noising.add_noise(latents, noise, timesteps)
        states, pooled = self.prompts(batch)
        side = self.size.side
        sizes = torch.tensor([[side, side, 0, 0, side, side]], dtype=torch.float32).repeat(len(noisy), 1)
        added = {"time_ids": sizes, "text_embeds": pooled.repeat(2, 1)}

        def difference(unet: nn.Module) -> Tensor:
            predicted = unet(noisy, timesteps, states.repeat(2, 1, 1), added_cond_kwargs=added).sample
            chosen, rejected = (predicted.float() - noise.float()).pow(2).mean(dim=[1, 2, 3]).chunk(2)
            return chosen - rejected

        policy = difference(self.unet)
        with torch.no_grad():
            if self.reference is not None:
                reference = difference(self.reference)
            else:
                self.unet.disable_adapters()
                reference = difference(self.unet)
                self.unet.enable_adapters()
        return -logsigmoid(-0.5 * BETA * (policy - reference)).mean()

    def train(self, before_step: Callable[[], None]) -> list[Step]:
        """Take every step; the function is also called after the last."""
        found = []
        for batch in self.batches():
            before_step()
            loss = self.loss(batch)
            loss.backward()
            norm = nn.utils.clip_grad_norm_(self.weights, MAX_NORM)
            self.optimizer.step()
            self.optimizer.zero_grad()
            found.append((loss.item(), norm.item()))
        before_step()
        return found

    def held(self) -> dict[str, int]:
        """Bytes of weights and states, by what they are for."""
        encoders = () if self.pipe is None else (self.pipe.vae, self.pipe.text_encoder, self.pipe.text_encoder_2)
        return account(self.unet, self.reference, self.optimizer) | {"encoders": sum(map(weight_bytes, encoders))}


class BeforeStep(TrainerCallback):
    """Calls a function before every step and after the last."""

    def __init__(self, call: Callable[[], None]) -> None:
        self.call = call

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.call()

    on_train_end = on_step_begin


class Ours:
    """This project's trainer with the scripts' settings; all else is at its default."""

    def __init__(self, job: Job) -> None:
        args = DiffusionPreferenceConfig(
            output_dir=f"{job.folder}/{job.trained}",
            image_cache_dir=f"{job.folder}/cache",
            encode_batch_size=ENCODED_AT_ONCE,
            use_cpu=True,
            loss="dpo",
            beta=BETA,
            per_device_train_batch_size=job.pairs,
            max_steps=job.steps,
            train_sampling_strategy="sequential",
            learning_rate=LEARNING_RATE,
            lr_scheduler_type="constant",
            weight_decay=WEIGHT_DECAY,
            max_grad_norm=MAX_NORM,
            activation_checkpointing=job.recompute,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            seed=SEED,
        )
        self.trainer = DiffusionPreferenceTrainer(
            f"{job.folder}/pipe",
            args,
            load_from_disk(f"{job.folder}/rows"),
            peft_config=None if job.trained == "full" else lora(),
        )
        self.unet = self.trainer.model.network
        same_start(self.unet)

    def train(self, before_step: Callable[[], None]) -> list[Step]:
        """Take every step; the function is also called after the last."""
        self.trainer.remove_callback(PrinterCallback)
        self.trainer.add_callback(BeforeStep(before_step))
        self.trainer.train()
        return [(entry["loss"], entry["grad_norm"]) for entry in self.trainer.state.log_history if "loss" in entry]

    def held(self) -> dict[str, int]:
        """Bytes of weights and states, by what they are for."""
        return account(self.unet, self.trainer.reference, self.trainer.optimizer) | {"encoders": 0}


CONTENDERS: dict[str, Callable[[Job], Ours | Script]] = {"ours": Ours, "script": Script}


def weight_bytes(network: nn.Module | None) -> int:
    """Of the parameters of a network."""
    return 0 if network is None else sum(weight.nbytes for weight in network.parameters())


def account(network: nn.Module, reference: nn.Module | None, optimizer: Any) -> dict[str, int]:
    """Bytes of the trained network, its reference, its gradients and the optimizer's state."""
    states = [value for state in optimizer.state_dict()["state"].values() for value in state.values()]
    return {
        "network": weight_bytes(network),
        "reference": weight_bytes(reference),
        "gradients": sum(weight.nbytes for weight in trained(network).values()),
        "optimizer": sum(value.nbytes for value in states),
    }


def gaps(job: Job) -> tuple[float, float]:
    """Distance of both contenders' losses of the first batch, and of the gradients as a share of the gradient's norm.

    First both policies are moved off the reference alike, for the reference to matter and every gradient to be there.
    """
    ours, script = Ours(job), Script(job)
    for network in (ours.unet, script.unet):
        draws = torch.Generator().manual_seed(1)
        for weight in trained(network).values():
            weight.data += 1e-3 * torch.randn(weight.shape, generator=draws)
    trainer = ours.trainer
    trainer.start_may_differ = "moved"
    model = trainer.model.train()
    losses = (
        trainer.compute_loss(model, next(iter(trainer.get_train_dataloader()))),
        script.loss(next(script.batches())),
    )
    gradients = []
    for loss, network in zip(losses, (ours.unet, script.unet), strict=True):
        loss.backward()
        own = trained(network)
        gradients.append(torch.cat([own[name].grad.flatten() for name in sorted(own)]))
    apart = float((gradients[0] - gradients[1]).norm() / gradients[1].norm())
    return abs(losses[0].item() - losses[1].item()), apart
