"""Rollouts: against ordinary pipelines, rows that are the same in every batch, log-probabilities that come back."""

from collections.abc import Callable

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DiffusionPipeline,
    EulerAncestralDiscreteScheduler,
    LCMScheduler,
    StableDiffusion3Pipeline,
)
from torch import Tensor, nn

from llmalign.diffusion.rollouts import (
    Denoise,
    guided,
    row_noise,
    sample_latents,
    sample_transitions,
    transition_logps,
)
from llmalign.diffusion.transitions import Sampler, consistency, ddim, euler_ancestral, flow_sde

SCHEDULE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
DDIM = {**SCHEDULE, "clip_sample": False, "set_alpha_to_one": False}
SHAPE = (4, 4, 4)
PROMPTS = ["digit seven", "red digit two", "blue"]
NEGATIVE = ["green", "", "zero"]


class Fake(nn.Module):
    """Elementwise, so that no row can change another, not even in its last bit; float64 keeps its precision."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([0.3, -0.2, 0.1, 0.05], dtype=torch.float64))
        self.rows: list[int] = []

    def forward(self, noisy: Tensor, timesteps: Tensor, conditions: dict[str, Tensor]) -> Tensor:
        assert timesteps.shape == (len(noisy),)
        self.rows.append(len(noisy))
        weight = self.weight.to(noisy)
        told = (timesteps / 1000).to(noisy).reshape(-1, 1, 1, 1)
        return (
            weight[0] * noisy
            + weight[1] * told
            + weight[2] * torch.tanh(noisy)
            + weight[3] * conditions["text"].to(noisy)
        )


def text(rows: int, value: float = 1.0) -> dict[str, Tensor]:
    return {"text": value * torch.arange(1.0, rows + 1).reshape(-1, 1, 1, 1)}


def never(step: int) -> Tensor:
    raise AssertionError(f"noise was drawn for step {step}")


def step_noise(*key: int | str, row_ids: list[int]) -> Callable[[int], Tensor]:
    return lambda step: row_noise((*key, step), row_ids, SHAPE)


# Against ordinary pipelines


def unet_denoiser(pipe: DiffusionPipeline) -> Denoise:
    return lambda noisy, timesteps, conditions: (
        pipe.unet(noisy, timesteps, encoder_hidden_states=conditions["text"]).sample
    )


def encoded(pipe: DiffusionPipeline, prompts: list[str], negative: list[str]) -> list[dict[str, Tensor]]:
    with torch.no_grad():
        embeds = pipe.encode_prompt(prompts, "cpu", 1, True, negative_prompt=negative)
    return [{"text": value} for value in embeds]


@pytest.mark.parametrize("guidance", [1.0, 5.0])
@pytest.mark.parametrize("kind", ["sd", "sd2"])
def test_ddim_without_noise_is_the_pipeline(tiny_pipeline, kind, guidance):
    pipe = tiny_pipeline(kind)
    initial = row_noise((0, "initial"), [3, 1, 2], SHAPE)
    theirs = pipe(
        PROMPTS,
        negative_prompt=NEGATIVE,
        num_inference_steps=5,
        guidance_scale=guidance,
        latents=initial,
        output_type="latent",
    ).images
    conditions, unconditional = encoded(pipe, PROMPTS, NEGATIVE)
    sampler = ddim(pipe.scheduler.config, 5, eta=0.0)
    denoise = guided(unet_denoiser(pipe), unconditional, guidance)
    ours = sample_latents(denoise, sampler, conditions, initial=initial)
    assert not ours.requires_grad
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    rollout = sample_transitions(denoise, sampler, conditions, initial=initial, noise=never)
    assert torch.equal(rollout.latents[-1], ours)
    assert rollout.log_probs.isnan().all()


@pytest.mark.parametrize(
    ("scheduler", "build", "given"),
    [
        (DDIMScheduler(**DDIM), ddim, {"eta": 1.0}),
        (EulerAncestralDiscreteScheduler(**SCHEDULE, timestep_spacing="trailing"), euler_ancestral, {}),
        (LCMScheduler(**SCHEDULE), consistency, {"timesteps": [999, 749, 499, 249]}),
    ],
    ids=["ddim", "euler", "consistency"],
)
def test_samplers_with_noise_are_the_pipeline_under_the_same_noise(tiny_pipeline, scheduler, build, given):
    pipe = tiny_pipeline("sd")
    pipe.scheduler = scheduler
    initial = row_noise((0, "initial"), [3, 1, 2], SHAPE)
    theirs = pipe(
        PROMPTS,
        negative_prompt=NEGATIVE,
        num_inference_steps=4,
        guidance_scale=3.0,
        latents=initial,
        generator=torch.Generator().manual_seed(7),
        output_type="latent",
        **given,
    ).images
    conditions, unconditional = encoded(pipe, PROMPTS, NEGATIVE)
    sampler: Sampler = build(scheduler.config, 4)
    drawn = torch.Generator().manual_seed(7)
    rollout = sample_transitions(
        guided(unet_denoiser(pipe), unconditional, 3.0),
        sampler,
        conditions,
        initial=initial,
        noise=lambda step: torch.randn(3, *SHAPE, generator=drawn),
    )
    scale = theirs.abs().max().item()
    torch.testing.assert_close(rollout.latents[-1] / scale, theirs / scale, rtol=0, atol=1e-4)


def test_flow_without_noise_is_the_pipeline(tiny_pipeline):
    pipe: StableDiffusion3Pipeline = tiny_pipeline("sd3")
    initial = row_noise((0, "initial"), [3, 1, 2], SHAPE)
    theirs = pipe(
        PROMPTS,
        negative_prompt=NEGATIVE,
        num_inference_steps=5,
        guidance_scale=4.0,
        latents=initial,
        output_type="latent",
    ).images
    with torch.no_grad():
        embeds = pipe.encode_prompt(PROMPTS, None, None, negative_prompt=NEGATIVE)
    conditions = {"text": embeds[0], "pooled": embeds[2]}
    unconditional = {"text": embeds[1], "pooled": embeds[3]}

    def denoiser(noisy: Tensor, timesteps: Tensor, given: dict[str, Tensor]) -> Tensor:
        return pipe.transformer(noisy, given["text"], given["pooled"], timesteps, return_dict=False)[0]

    sampler = flow_sde(pipe.scheduler.config, 5, noise_level=0.0)
    ours = sample_latents(guided(denoiser, unconditional, 4.0), sampler, conditions, initial=initial)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_one_step_of_euler_ancestral_has_no_noise_and_starts_from_sigma(tiny_pipeline):
    pipe = tiny_pipeline("sd")
    pipe.scheduler = EulerAncestralDiscreteScheduler(**SCHEDULE, timestep_spacing="trailing")
    initial = row_noise((0, "initial"), [3], SHAPE)
    theirs = pipe(PROMPTS[:1], num_inference_steps=1, guidance_scale=0.0, latents=initial, output_type="latent").images
    conditions, _ = encoded(pipe, PROMPTS[:1], [""])
    sampler = euler_ancestral(pipe.scheduler.config, 1)
    ours = sample_latents(unet_denoiser(pipe), sampler, conditions, initial=initial)
    scale = theirs.abs().max().item()
    torch.testing.assert_close(ours / scale, theirs / scale, rtol=0, atol=1e-4)


# What a rollout holds


SAMPLERS = {
    "ddim": lambda: ddim(DDIM, 5),
    "consistency": lambda: consistency(DDIM, 5),
    "euler": lambda: euler_ancestral({**SCHEDULE, "timestep_spacing": "trailing"}, 5),
    "flow": lambda: flow_sde({"shift": 3.0}, 5),
}
every_sampler = pytest.mark.parametrize("build", SAMPLERS.values(), ids=SAMPLERS.keys())


@every_sampler
@pytest.mark.parametrize("guidance", [1.0, 2.5])
def test_log_probabilities_of_what_was_sampled_come_back_row_by_row(build, guidance):
    sampler, model, ids = build(), Fake(), [4, 9, 2]
    denoise = guided(model, text(1, -1.0), guidance)
    rollout = sample_transitions(
        denoise, sampler, text(3), initial=row_noise((0,), ids, SHAPE), noise=step_noise(0, row_ids=ids)
    )
    assert rollout.latents.shape == (6, 3, *SHAPE) and rollout.log_probs.shape == (5, 3)
    assert rollout.latents.dtype == rollout.log_probs.dtype == torch.float32
    assert set(model.rows) == ({3} if guidance == 1 else {6})
    assert not rollout.latents.requires_grad
    assert rollout.log_probs.isfinite().all(dim=1).nonzero().flatten().tolist() == sampler.stochastic
    # All transitions of all rows in one batch, each at its own step, shuffled.
    steps, rows = (
        grid.flatten() for grid in torch.meshgrid(torch.tensor(sampler.stochastic), torch.arange(3), indexing="ij")
    )
    order = torch.randperm(len(steps), generator=torch.Generator().manual_seed(0))
    steps, rows = steps[order], rows[order]
    logps = transition_logps(
        denoise,
        sampler,
        steps,
        rollout.latents[steps, rows],
        rollout.latents[steps + 1, rows],
        {"text": text(3)["text"][rows]},
    )
    torch.testing.assert_close(logps, rollout.log_probs[steps, rows], rtol=1e-4, atol=1e-4)
    assert logps.requires_grad


@every_sampler
def test_log_probabilities_are_those_of_the_noise_that_was_drawn(build):
    # x' = mean + std z: log N = -z^2/2 - log std - log(2 pi)/2, whatever the network says.
    sampler, ids = build(), [4, 9]
    noise = step_noise(0, row_ids=ids)
    rollout = sample_transitions(Fake(), sampler, text(2), initial=row_noise((0,), ids, SHAPE), noise=noise)
    for step in sampler.stochastic:
        constant = sampler.std[step].log().item() + 0.918938533
        expected = -0.5 * noise(step).square().flatten(1).mean(1) - constant
        torch.testing.assert_close(rollout.log_probs[step], expected, rtol=1e-4, atol=1e-4)


@every_sampler
def test_a_row_is_the_same_in_every_batch(build):
    def rollout(ids: list[int]) -> Tensor:
        conditions = {"text": torch.tensor(ids, dtype=torch.float32).reshape(-1, 1, 1, 1) / 10}
        initial, noise = row_noise((0, "initial"), ids, SHAPE), step_noise(0, row_ids=ids)
        return sample_transitions(Fake(), build(), conditions, initial=initial, noise=noise).latents

    together = rollout([5, 3, 8])
    for place, row_id in enumerate([5, 3, 8]):
        assert torch.equal(rollout([row_id])[:, 0], together[:, place])
    assert torch.equal(rollout([8, 5])[:, 1], together[:, 0])


def test_noise_depends_on_every_part_of_its_key():
    base = row_noise((0, "first", 1), [7, 8], SHAPE)
    assert base.shape == (2, *SHAPE) and base.dtype == torch.float32
    assert torch.equal(base, row_noise((0, "first", 1), [7, 8], SHAPE))
    others = [((1, "first", 1), 7), ((0, "second", 1), 7), ((0, "first", 2), 7), ((0, "first", 1), 8)]
    for key, row_id in others:
        assert not torch.equal(base[0], row_noise(key, [row_id], SHAPE)[0])


def test_sampling_leaves_the_random_state_alone():
    before = torch.get_rng_state()
    noise = step_noise(0, row_ids=[1])
    sample_transitions(Fake(), ddim(DDIM, 3), text(1), initial=row_noise((0,), [1], SHAPE), noise=noise)
    assert torch.equal(before, torch.get_rng_state())


# Gradients and guidance


@every_sampler
def test_gradients_of_log_probabilities_are_those_of_finite_differences(build):
    sampler, model = build(), Fake()
    steps = torch.tensor([0, 3])
    x, following = (row_noise((key,), [1, 2], SHAPE).double() for key in (0, 1))
    denoise = guided(model, text(1, -1.0), 2.0)

    def logps(weight: Tensor) -> Tensor:
        model.weight.data = weight.detach()
        return transition_logps(denoise, sampler, steps, x, following, text(2))

    start = model.weight.detach().clone()
    losses = logps(start)
    assert losses.dtype == torch.float64
    for row in range(2):
        (slope,) = torch.autograd.grad(logps(start)[row], model.weight)
        for place in range(4):
            offset = torch.zeros(4, dtype=torch.float64)
            offset[place] = 1e-5
            difference = (logps(start + offset)[row] - logps(start - offset)[row]).item() / 2e-5
            assert slope[place].item() == pytest.approx(difference, rel=1e-5, abs=1e-7)


def test_guidance_extrapolates_from_the_prediction_without_caption():
    model, noisy, timesteps = Fake(), row_noise((0,), [1, 2], SHAPE), torch.tensor([999, 1])
    with torch.no_grad():
        c = model(noisy, timesteps, text(2))
        u = model(noisy, timesteps, {"text": torch.full((2, 1, 1, 1), -1.0)})
        for empty in (text(1, -1.0), {"text": torch.full((2, 1, 1, 1), -1.0)}):
            ours = guided(model, empty, 7.5)(noisy, timesteps, text(2))
            torch.testing.assert_close(ours, u + 7.5 * (c - u), rtol=1e-6, atol=1e-6)
        assert torch.equal(guided(model, text(1, -1.0), 0.0)(noisy, timesteps, text(2)), u)
        assert torch.equal(guided(model, None, 1.0)(noisy, timesteps, text(2)), c)


def test_guidance_is_worked_out_in_full_precision():
    def half(noisy: Tensor, timesteps: Tensor, conditions: dict[str, Tensor]) -> Tensor:
        return (noisy + conditions["text"]).bfloat16()

    noisy, timesteps = torch.ones(1, *SHAPE), torch.tensor([1])
    with_caption, empty = {"text": torch.full((1, 1, 1, 1), 0.0078125)}, {"text": torch.zeros(1, 1, 1, 1)}
    # 1 and 1 + 2^-7 are bfloat16 numbers, 1 + 3.5 * 2^-7 is none.
    prediction = guided(half, empty, 3.5)(noisy, timesteps, with_caption)
    assert prediction.dtype == torch.float32 and prediction.unique().tolist() == [1 + 3.5 * 2**-7]


# Bad input


def test_guidance_without_conditions_for_it_is_refused():
    with pytest.raises(ValueError, match="guidance 5.0 needs the conditions of a caption that is empty"):
        guided(Fake(), None, 5.0)
    denoise = guided(Fake(), {"pooled": torch.zeros(1)}, 5.0)
    with pytest.raises(ValueError, match=r"conditions are \['text'\], those without caption \['pooled'\]"):
        denoise(torch.zeros(1, *SHAPE), torch.tensor([1]), text(1))


def test_latents_alone_are_refused_of_a_sampler_with_noise():
    with pytest.raises(ValueError, match="adds noise: build it with eta or noise_level 0"):
        sample_latents(Fake(), ddim(DDIM, 3), text(1), initial=row_noise((0,), [1], SHAPE))


def test_one_noise_for_all_rows_is_refused():
    initial = row_noise((0,), [1, 2], SHAPE)
    with pytest.raises(ValueError, match=r"noise must have the latents' shape \(2, 4, 4, 4\), got \(1, 4, 4, 4\)"):
        sample_transitions(Fake(), ddim(DDIM, 3), text(2), initial=initial, noise=step_noise(0, row_ids=[1]))


def test_a_step_without_noise_has_no_log_probability():
    x = row_noise((0,), [1, 2], SHAPE)
    with pytest.raises(ValueError, match="row 1 has a step of std 0.0"):
        transition_logps(Fake(), consistency(DDIM, 3), torch.tensor([0, 2]), x, x, text(2))


def test_a_prediction_of_another_shape_is_refused():
    def both_halves(noisy: Tensor, timesteps: Tensor, conditions: dict[str, Tensor]) -> Tensor:
        return torch.cat([noisy, noisy], dim=1)

    x = row_noise((0,), [1], SHAPE)
    with pytest.raises(ValueError, match=r"the latents' shape \(1, 4, 4, 4\)"):
        transition_logps(both_halves, ddim(DDIM, 3), torch.tensor([0]), x, x, text(1))
