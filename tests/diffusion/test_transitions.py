"""Transitions: recorded vectors, one step after another against the schedulers of diffusers, bad input."""

import math
from functools import partial

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    LCMScheduler,
    PNDMScheduler,
)

from llmalign.diffusion.transitions import (
    Sampler,
    consistency,
    consistency_coefficients,
    ddim,
    ddim_coefficients,
    euler_ancestral,
    euler_ancestral_coefficients,
    flow_sde,
    flow_sde_coefficients,
    log_prob,
)
from llmalign.errors import UserError
from tests.diffusion.vectors import ALPHAS, VECTORS, assert_recorded, seq, tensor

SCHEDULE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
DDIM = {**SCHEDULE, "clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1}
SHAPE = (2, 4, 3, 3)


def sampler_of(*coefficients: torch.Tensor) -> Sampler:
    steps = len(coefficients[0])
    return Sampler(torch.zeros(steps), *coefficients, torch.ones(steps, dtype=torch.float64))


def standard_normal(seed: int, shape: tuple[int, ...] = SHAPE, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


# The recorded vectors


def test_the_schedule_of_the_vectors():
    for step, alpha in VECTORS["alphas_cumprod"].items():
        assert ALPHAS[int(step)].item() == pytest.approx(alpha, rel=1e-12)


@pytest.mark.parametrize("case", VECTORS["ddim_logprob"], ids=lambda case: f"t{case['t']}")
def test_ddim(case):
    alphas = ALPHAS[[case["t"]]], ALPHAS[[case["prev_t"]]]
    sampler = sampler_of(*ddim_coefficients(*alphas, "epsilon", case["eta"]))
    noise = seq(case["eps"]).requires_grad_()
    mean, std = sampler.mean_std(0, noise, seq(case["x_t"]))
    logp = log_prob(seq(case["x_prev"]), mean, std)
    assert_recorded(mean, case["mean"])
    assert_recorded(std, case["std"])
    assert_recorded(logp, case["log_prob"])
    assert_recorded(torch.autograd.grad(logp.sum(), noise)[0], case["dlogp_deps"])


@pytest.mark.parametrize("case", VECTORS["ddim_logprob"], ids=lambda case: f"t{case['t']}")
def test_ddim_of_a_pipelines_config_agrees_as_far_as_a_float32_schedule_can(case):
    sampler = ddim(DDIMScheduler(**DDIM).config, case["num_steps"], eta=case["eta"])
    step = sampler.timesteps.tolist().index(case["t"])
    mean, std = sampler.mean_std(step, seq(case["eps"]), seq(case["x_t"]))
    torch.testing.assert_close(mean, tensor(case["mean"]), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(std, tensor([case["std"]]), rtol=1e-4, atol=0)
    assert log_prob(seq(case["x_prev"]), mean, std).item() == pytest.approx(case["log_prob"], rel=1e-3)


def test_a_step_from_timestep_0_has_no_log_probability():
    case = VECTORS["ddim_logprob_degenerate"]
    alphas = ALPHAS[[case["t"]]]
    sampler = sampler_of(*ddim_coefficients(alphas, alphas, "epsilon", 1.0))
    x = seq("seq(1,1,2,2,k=1.3)")
    mean, std = sampler.mean_std(0, seq("seq(1,1,2,2,k=.6)"), x)
    assert std.item() == case["std"] == 0 and sampler.stochastic == []
    assert_recorded(mean, x.tolist())
    with pytest.raises(ValueError, match="row 0 has a step of std 0.0"):
        log_prob(x, mean, std)


@pytest.mark.parametrize("case", VECTORS["pso_online"], ids=lambda case: f"{case['kind'].split()[0]}-{case['t']}")
def test_pso_online(case):
    if "euler" in case["kind"]:
        sampler = sampler_of(
            *euler_ancestral_coefficients(tensor([case["sigma"], case["sigma_next"]]), prediction_type="epsilon")
        )
        assert ((1 - ALPHAS[case["t"]]) / ALPHAS[case["t"]]).sqrt().item() == pytest.approx(case["sigma"], rel=1e-9)
    else:
        sampler = sampler_of(*consistency_coefficients(ALPHAS[[case["t"], case["t_next"]]], "epsilon"))
    noise = seq(case["eps"]).requires_grad_()
    mean, std = sampler.mean_std(0, noise, seq(case["x_t"]))
    logp = log_prob(seq(case["x_next"]), mean, std)
    assert_recorded(mean, case["mean"])
    assert_recorded(std, case["std"])
    assert_recorded(logp, case["log_prob"])
    # d/dmean of the mean over D dims of -(x' - mean)^2 / (2 std^2) is (x' - mean) / (D std^2).
    slope = (seq(case["x_next"]) - mean.detach()) / (4 * std.item() ** 2) * sampler.on_prediction[0]
    assert_recorded(torch.autograd.grad(logp.sum(), noise)[0], slope.tolist())


def test_flow_sde():
    case = VECTORS["flow_sde_logprob"]
    grids = [tensor([s, then]) for s, then in zip(case["sigma"], case["sigma_next"], strict=True)]
    # A grid from s = 1 takes the diffusion of its second entry there, a later one that of its own first.
    assert grids[0][1] == case["sigma_max_sub"]
    rows = [flow_sde_coefficients(grid, case["noise_level"]) for grid in grids]
    sampler = sampler_of(*(torch.cat(parts) for parts in zip(*rows, strict=True)))
    velocity = seq(case["v"]).requires_grad_()
    mean, std = sampler.mean_std(torch.tensor([0, 1]), velocity, seq(case["x_t"]))
    logp = log_prob(seq(case["x_next"]), mean, std)
    assert_recorded(mean, case["mean"])
    assert_recorded(std, case["std"])
    assert_recorded(logp, case["log_prob"])
    slope = (seq(case["x_next"]) - mean.detach()) / (4 * std.square().reshape(2, 1, 1, 1))
    slope = slope * sampler.on_prediction.reshape(2, 1, 1, 1)
    assert_recorded(torch.autograd.grad(logp.sum(), velocity)[0], slope.tolist())


# Log-probabilities


def test_log_prob_is_the_mean_of_the_normal_density():
    following, mean = standard_normal(0, dtype=torch.float64), standard_normal(1, dtype=torch.float64)
    std = tensor([0.3, 2.0])
    density = torch.distributions.Normal(mean, std.reshape(2, 1, 1, 1)).log_prob(following)
    torch.testing.assert_close(log_prob(following, mean, std), density.flatten(1).mean(1), rtol=1e-12, atol=0)
    # By hand: 2 away with std 2 is -1/2 - log 2 - log(2 pi)/2.
    at_two = log_prob(torch.full((1, 5), 2.0), torch.zeros(1, 5), torch.tensor([2.0]))
    assert at_two.item() == pytest.approx(-0.5 - math.log(2) - 0.918938533, rel=1e-6)


def test_gradients_of_log_prob_are_those_of_finite_differences():
    following, mean = (standard_normal(seed, (2, 3), torch.float64).requires_grad_() for seed in (0, 1))
    assert torch.autograd.gradcheck(log_prob, (following, mean, tensor([0.5, 1.5])))


@pytest.mark.parametrize("bad", [0.0, -1.0, math.nan], ids=str)
def test_a_std_that_is_not_above_nought_is_refused(bad):
    with pytest.raises(ValueError, match=f"row 1 has a step of std {bad}"):
        log_prob(torch.zeros(2, 3), torch.zeros(2, 3), torch.tensor([1.0, bad]))


def test_shapes_of_log_prob_are_checked():
    for shapes in [((2, 3), (2, 1), (2,)), ((2, 3), (2, 3), (2, 1)), ((2, 3), (2, 3), ())]:
        with pytest.raises(ValueError, match="must have one shape"):
            log_prob(*map(torch.ones, shapes))


# Parity with diffusers


def assert_ddim_is_followed(config: dict, steps: int, eta: float) -> Sampler:
    scheduler = DDIMScheduler(**config)
    scheduler.set_timesteps(steps)
    sampler = ddim(scheduler.config, steps, eta=eta)
    assert torch.equal(sampler.timesteps, scheduler.timesteps)
    assert sampler.timesteps.dtype == scheduler.timesteps.dtype
    assert sampler.initial_scale == scheduler.init_noise_sigma
    for step, timestep in enumerate(scheduler.timesteps):
        x, prediction, noise = (standard_normal(3 * step + place) for place in range(3))
        theirs = scheduler.step(prediction, timestep, x, eta=eta, variance_noise=noise if eta else None).prev_sample
        mean, std = sampler.mean_std(step, prediction, x)
        assert torch.equal(sampler.model_input(step, x), scheduler.scale_model_input(x, timestep))
        torch.testing.assert_close(mean + std.reshape(-1, 1, 1, 1) * noise, theirs, rtol=1e-5, atol=1e-5)
    return sampler


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("steps", [1, 7, 20])
@pytest.mark.parametrize("spacing", ["leading", "trailing"])
def test_ddim_steps_are_those_of_diffusers(spacing, steps, eta, prediction_type):
    config = {**DDIM, "timestep_spacing": spacing, "prediction_type": prediction_type}
    sampler = assert_ddim_is_followed(config, steps, eta)
    assert sampler.stochastic == (list(range(steps)) if eta else [])


def test_other_schedules_of_ddim():
    # To the clean image at the end: without noise there.
    sampler = assert_ddim_is_followed({**DDIM, "set_alpha_to_one": True}, 10, 1.0)
    assert sampler.stochastic == list(range(9)) and sampler.std[-1] == 0
    # Timestep 0 is no obstacle where no noise is asked for.
    assert_ddim_is_followed({**DDIM, "timestep_spacing": "linspace"}, 10, 0.0)
    assert_ddim_is_followed({**DDIM, "steps_offset": 0}, 10, 0.0)
    # A step to timestep 0 itself, which is not the clean image.
    assert_ddim_is_followed({**DDIM, "steps_offset": 0, "set_alpha_to_one": True}, 250, 0.0)
    # Without signal at the start, as models of v-prediction are sampled.
    zero = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing", "prediction_type": "v_prediction"}
    assert_ddim_is_followed({**DDIM, **zero}, 5, 1.0)


@pytest.mark.parametrize(
    "scheduler",
    [
        EulerDiscreteScheduler(**SCHEDULE, steps_offset=1, timestep_spacing="leading"),
        PNDMScheduler(**SCHEDULE, steps_offset=1, skip_prk_steps=True),
        DDPMScheduler(**SCHEDULE, steps_offset=1, clip_sample=False),
    ],
    ids=lambda scheduler: type(scheduler).__name__,
)
def test_ddim_takes_the_config_of_another_scheduler(scheduler):
    sampler = ddim(scheduler.config, 20)
    assert sampler.timesteps.tolist() == list(range(951, 0, -50))
    # Their configs leave it to DDIM to go to the clean image at the end.
    assert sampler.stochastic == list(range(19))


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
def test_euler_ancestral_steps_are_those_of_diffusers(spacing, prediction_type):
    config = {**SCHEDULE, "steps_offset": 1, "timestep_spacing": spacing, "prediction_type": prediction_type}
    scheduler = EulerAncestralDiscreteScheduler(**config)
    scheduler.set_timesteps(4)
    sampler = euler_ancestral(scheduler.config, 4)
    assert torch.equal(sampler.timesteps, scheduler.timesteps)
    assert sampler.timesteps.dtype == scheduler.timesteps.dtype
    assert sampler.initial_scale == pytest.approx(float(scheduler.init_noise_sigma), rel=1e-6)
    assert sampler.stochastic == [0, 1, 2]
    for step, timestep in enumerate(scheduler.timesteps):
        x, prediction, noise = (standard_normal(3 * step + place) for place in range(3))
        x = x * scheduler.sigmas[step]
        ours = sampler.model_input(step, x)
        torch.testing.assert_close(ours, scheduler.scale_model_input(x, timestep), rtol=1e-6, atol=1e-6)
        generator = torch.Generator().manual_seed(3 * step + 2)  # draws what `noise` is
        theirs = scheduler.step(prediction, timestep, x, generator=generator).prev_sample
        mean, std = sampler.mean_std(step, prediction, x)
        torch.testing.assert_close(mean + std.reshape(-1, 1, 1, 1) * noise, theirs, rtol=1e-5, atol=1e-5)


def test_turbos_timesteps():
    sampler = euler_ancestral({**SCHEDULE, "timestep_spacing": "trailing", "prediction_type": "epsilon"}, 4)
    assert sampler.timesteps.tolist() == [999, 749, 499, 249]
    up = [case["std"] for case in VECTORS["pso_online"] if "euler" in case["kind"]]
    torch.testing.assert_close(sampler.std, tensor([*up, 0.0]), rtol=1e-5, atol=0)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_consistency_steps_are_those_of_diffusers(prediction_type):
    scheduler = LCMScheduler(**SCHEDULE, prediction_type=prediction_type, timestep_scaling=1e4)  # no boundary terms
    scheduler.set_timesteps(timesteps=[999, 749, 499, 249])
    sampler = consistency(scheduler.config, 4)
    assert torch.equal(sampler.timesteps, scheduler.timesteps)
    assert sampler.stochastic == [0, 1, 2] and sampler.initial_scale == scheduler.init_noise_sigma
    for step, timestep in enumerate(scheduler.timesteps):
        x, prediction, noise = (standard_normal(3 * step + place) for place in range(3))
        theirs = scheduler.step(prediction, timestep, x, torch.Generator().manual_seed(3 * step + 2)).prev_sample
        mean, std = sampler.mean_std(step, prediction, x)
        torch.testing.assert_close(mean + std.reshape(-1, 1, 1, 1) * noise, theirs, rtol=1e-5, atol=1e-5)


def test_consistency_takes_the_distilled_grid_whatever_the_config_says():
    config = DDIMScheduler(**DDIM, timestep_spacing="leading").config
    assert consistency(config, 4).timesteps.tolist() == [999, 749, 499, 249]
    assert consistency(config, 8).timesteps.tolist() == [999, 874, 749, 624, 499, 374, 249, 124]
    assert consistency(config, 4, timestep_spacing="leading").timesteps.tolist() == [751, 501, 251, 1]


@pytest.mark.parametrize(
    ("config", "given"),
    [
        ({"shift": 3.0}, {}),
        ({"shift": 1.0}, {"sigmas": [1.0, 0.75, 0.5, 0.25]}),
        ({"shift": 3.0, "use_dynamic_shifting": True}, {"mu": 0.6, "sigmas": [1.0, 0.75, 0.5, 0.25]}),
    ],
    ids=["sd3", "schnell", "flux"],
)
def test_flow_steps_without_noise_are_those_of_diffusers(config, given):
    scheduler = FlowMatchEulerDiscreteScheduler(**config)
    scheduler.set_timesteps(4, **given)
    sampler = flow_sde(scheduler.config, 4, noise_level=0.0, **given)
    assert torch.equal(sampler.timesteps, scheduler.timesteps)
    assert sampler.stochastic == [] and sampler.initial_scale == 1
    for step, timestep in enumerate(scheduler.timesteps):
        x, prediction = standard_normal(2 * step), standard_normal(2 * step + 1)
        mean, _ = sampler.mean_std(step, prediction, x)
        torch.testing.assert_close(mean, scheduler.step(prediction, timestep, x).prev_sample, rtol=1e-5, atol=1e-6)


def test_flow_steps_with_noise_keep_the_marginals():
    # For data that is all 0, x_s is normal with std s and the velocity is x_s / s. An Euler step of the SDE keeps that
    # up to second order in its size: tiny steps must lead from s to s' = the smaller std.
    sigmas = torch.linspace(1.0, 0.2, 4001, dtype=torch.float64)
    on_sample, on_prediction, std = flow_sde_coefficients(sigmas, noise_level=0.7)
    variance = tensor(1.0)
    for step in range(4000):
        variance = (on_sample[step] + on_prediction[step] / sigmas[step]) ** 2 * variance + std[step] ** 2
    assert variance.sqrt().item() == pytest.approx(0.2, rel=1e-2)


def test_every_flow_step_adds_noise():
    sampler = flow_sde(FlowMatchEulerDiscreteScheduler(shift=3.0).config, 10)
    assert sampler.stochastic == list(range(10))
    assert torch.isfinite(sampler.std).all() and torch.isfinite(sampler.on_sample).all()


# The interface

SAMPLERS = {
    "ddim": partial(ddim, DDIM),
    "consistency": partial(consistency, DDIM),
    "euler": partial(euler_ancestral, {**SCHEDULE, "timestep_spacing": "trailing"}),
    "flow": partial(flow_sde, {"shift": 3.0}),
}
every_sampler = pytest.mark.parametrize("build", SAMPLERS.values(), ids=SAMPLERS.keys())


@every_sampler
def test_rows_at_steps_of_their_own_are_as_if_alone(build):
    sampler = build(5)
    steps = torch.tensor([3, 0, 4])
    x, prediction = standard_normal(0, (3, 4, 2, 2)), standard_normal(1, (3, 4, 2, 2))
    mean, std = sampler.mean_std(steps, prediction, x)
    timesteps, model_input = sampler.model_timesteps(steps, x), sampler.model_input(steps, x)
    assert timesteps.dtype == sampler.timesteps.dtype
    for row, step in enumerate(steps.tolist()):
        one = slice(row, row + 1)
        alone = sampler.mean_std(step, prediction[one], x[one])
        assert torch.equal(mean[one], alone[0]) and torch.equal(std[one], alone[1])
        assert torch.equal(timesteps[one], sampler.timesteps[step : step + 1])
        assert torch.equal(model_input[one], sampler.model_input(step, x[one]))


@every_sampler
@pytest.mark.parametrize(
    ("given", "computed"),
    [
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
    ids=str,
)
def test_half_precision_is_widened_and_double_precision_kept(build, given, computed):
    x, prediction = standard_normal(0).to(given), standard_normal(1).to(given)
    mean, std = build(5).mean_std(1, prediction, x)
    assert mean.dtype == std.dtype == computed
    exact = build(5).mean_std(1, prediction.double(), x.double())[0]
    torch.testing.assert_close(mean.double(), exact, rtol=1e-5, atol=1e-5)
    assert log_prob(x, mean, std).dtype == computed
    assert build(5).model_input(1, x).dtype == given


@every_sampler
def test_wrong_shapes_and_steps_are_refused(build):
    sampler, x = build(5), torch.zeros(2, 4, 2, 2)
    with pytest.raises(ValueError, match=r"shape \(2, 4, 2, 2\)"):
        sampler.mean_std(0, torch.zeros(2, 8, 2, 2), x)
    for steps in (torch.tensor([0]), torch.tensor([[0, 1]])):
        with pytest.raises(ValueError, match=r"steps must be one number or of shape \(2,\)"):
            sampler.mean_std(steps, x, x)
    for steps in (-1, 5, torch.tensor([0, 5])):
        with pytest.raises(ValueError, match=r"steps must lie in 0 \.\. 4"):
            sampler.model_timesteps(steps, x)


@every_sampler
@pytest.mark.parametrize("steps", [0, -1, 1001])
def test_a_number_of_steps_that_a_schedule_does_not_have_is_refused(build, steps):
    with pytest.raises(UserError, match=f"1 to 1000 steps, got {steps}"):
        build(steps)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: ddim({**DDIM, "steps_offset": 0}, 20), "end at timestep 0.*steps_offset=1"),
        (lambda: ddim({**DDIM, "timestep_spacing": "linspace"}, 20), "end at timestep 0.*'trailing'"),
        (lambda: ddim(DDIM, 20, eta=1.1), "eta must lie between 0 .* 1.1"),
        (lambda: ddim(DDIM, 20, eta=math.nan), "eta must lie between 0"),
        (lambda: ddim({**DDIM, "clip_sample": True}, 20), "clamp pixels, not latents"),
        (lambda: consistency({**DDIM, "thresholding": True}, 4), "clamp pixels, not latents"),
        (lambda: ddim({**DDIM, "prediction_type": "sample"}, 20), "'sample'; known are epsilon, v_prediction"),
        (lambda: euler_ancestral({**SCHEDULE, "prediction_type": "sample"}, 4), "'sample'; known are"),
        (
            lambda: consistency({**DDIM, "rescale_betas_zero_snr": True}, 4),
            "ends without signal .*take a model with prediction_type v_prediction",
        ),
        (lambda: ddim(FlowMatchEulerDiscreteScheduler().config, 20), "no 'beta_schedule'.*another kind of model"),
        (lambda: euler_ancestral(FlowMatchEulerDiscreteScheduler().config, 4), "no 'beta_schedule'"),
        (lambda: flow_sde(DDIM, 10), "no 'shift'"),
        (lambda: flow_sde({"shift": 3.0, "use_dynamic_shifting": True}, 10), "it needs mu"),
        (lambda: flow_sde({"shift": 3.0, "stochastic_sampling": True}, 10), "switch them off"),
        (lambda: flow_sde({"shift": 3.0, "invert_sigmas": True}, 10), "switch them off"),
        (lambda: flow_sde({"shift": 3.0}, 10, noise_level=-0.1), "noise_level must be"),
        (lambda: flow_sde({"shift": 3.0}, 10, noise_level=math.inf), "noise_level must be"),
    ],
)
def test_configs_that_cannot_be_followed_are_refused_in_one_sentence(build, message):
    with pytest.raises(UserError, match=message):
        build()
