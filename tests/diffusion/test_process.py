"""Noising processes against diffusers' own schedulers, their inverses, and how a step is drawn."""

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    LCMScheduler,
    PNDMScheduler,
)

from llmalign.diffusion.process import Diffusion, Flow, process_of
from llmalign.diffusion.tiny import DDIM, STABLE_DIFFUSION_SCHEDULE, build_tiny
from llmalign.errors import UserError

INDEX = torch.tensor([0, 1, 250, 749, 999])


def latents(seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(len(INDEX), 4, 4, 4, generator=torch.Generator().manual_seed(seed)).to(dtype)


CLEAN, NOISE = latents(0), latents(1)


def flow(**options) -> tuple[FlowMatchEulerDiscreteScheduler, Flow]:
    scheduler = FlowMatchEulerDiscreteScheduler(**options)
    process = process_of(scheduler)
    assert isinstance(process, Flow)
    return scheduler, process


# Against diffusers


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_diffusion_is_that_of_diffusers(prediction_type):
    process = process_of(DDIMScheduler(**DDIM, prediction_type=prediction_type))
    theirs = DDPMScheduler(**STABLE_DIFFUSION_SCHEDULE)
    assert len(process) == 1000 and torch.equal(process.model_timesteps(INDEX), INDEX)
    assert torch.equal(process.add_noise(CLEAN, NOISE, INDEX), theirs.add_noise(CLEAN, NOISE, INDEX))
    target = NOISE if prediction_type == "epsilon" else theirs.get_velocity(CLEAN, NOISE, INDEX)
    assert torch.equal(process.target(CLEAN, NOISE, INDEX), target)


@pytest.mark.parametrize("options", [{"shift": 3.0}, {"shift": 1.0}, {"shift": 3.0, "use_dynamic_shifting": True}])
def test_flow_is_that_of_diffusers(options):
    scheduler, process = flow(**options)
    told = process.model_timesteps(INDEX)
    assert len(process) == 1000 and torch.equal(told, scheduler.timesteps[INDEX])
    torch.testing.assert_close(
        process.add_noise(CLEAN, NOISE, INDEX), scheduler.scale_noise(CLEAN, told, NOISE), rtol=0, atol=0
    )
    # The step that samples: with the true velocity it goes from any s straight to the clean latents.
    noisy, velocity = process.add_noise(CLEAN, NOISE, INDEX), process.target(CLEAN, NOISE, INDEX)
    sigmas = scheduler.sigmas[INDEX].reshape(-1, 1, 1, 1)
    torch.testing.assert_close(noisy + (0 - sigmas) * velocity, CLEAN, rtol=0, atol=1e-5)
    torch.testing.assert_close(told, 1000 * scheduler.sigmas[INDEX])


def test_shift_of_a_flow_is_the_schedulers():
    # s -> 3 s / (1 + 2 s) at s = (1000 - i) / 1000
    index = torch.arange(0, 1000, 37)
    plain = (1000 - index) / 1000
    torch.testing.assert_close(flow(shift=3.0)[1].sigmas[index], 3 * plain / (1 + 2 * plain))
    torch.testing.assert_close(flow(shift=3.0, use_dynamic_shifting=True)[1].sigmas[index], plain)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_clean_latents_are_those_of_a_samplers_step(prediction_type):
    scheduler = DDIMScheduler(**DDIM, prediction_type=prediction_type)
    process = process_of(scheduler)
    for place, step in enumerate(INDEX[:4].tolist()):
        prediction, noisy = latents(2)[place : place + 1], latents(3)[place : place + 1]
        scheduler.set_timesteps(1000)
        theirs = scheduler.step(prediction, step, noisy).pred_original_sample
        ours = process.clean(prediction, noisy, INDEX[place : place + 1])
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_eulers_sampler_hands_the_network_latents_as_training_makes_them():
    scheduler = EulerDiscreteScheduler(**STABLE_DIFFUSION_SCHEDULE)  # it works on x / sqrt(abar)
    scheduler.set_timesteps(1000)
    process = process_of(scheduler)
    told = scheduler.timesteps[999 - INDEX]
    assert torch.equal(told.long(), INDEX)
    for row, time in enumerate(told):
        one = slice(row, row + 1)
        scheduler._step_index = None  # its place in the schedule, else remembered
        noisy = scheduler.scale_model_input(scheduler.add_noise(CLEAN[one], NOISE[one], time[None]), time)
        torch.testing.assert_close(process.add_noise(CLEAN[one], NOISE[one], INDEX[one]), noisy, rtol=0, atol=1e-5)


# Inverses


@pytest.mark.parametrize("kind", ["sd", "sd2", "sd3"])
def test_a_perfect_prediction_gives_back_latents_and_noise(kind):
    process = process_of(build_tiny(kind).scheduler)
    clean, noise = CLEAN.double(), NOISE.double()
    noisy, target = process.add_noise(clean, noise, INDEX), process.target(clean, noise, INDEX)
    assert noisy.dtype == target.dtype == torch.float64
    torch.testing.assert_close(process.clean(target, noisy, INDEX), clean, rtol=0, atol=1e-9)
    torch.testing.assert_close(process.noise(target, noisy, INDEX), noise, rtol=0, atol=1e-9)


@pytest.mark.parametrize("kind", ["sd", "sd2", "sd3"])
def test_clean_latents_and_noise_of_any_prediction_make_up_the_noisy_ones(kind):
    process = process_of(build_tiny(kind).scheduler)
    noisy, prediction = latents(2, torch.float64), latents(3, torch.float64)
    again = process.add_noise(process.clean(prediction, noisy, INDEX), process.noise(prediction, noisy, INDEX), INDEX)
    torch.testing.assert_close(again, noisy, rtol=0, atol=1e-9)


def test_every_row_meets_its_own_step():
    for kind in ("sd", "sd2", "sd3"):
        process = process_of(build_tiny(kind).scheduler)
        whole = process.add_noise(CLEAN, NOISE, INDEX), process.target(CLEAN, NOISE, INDEX)
        for row in range(len(INDEX)):
            one = slice(row, row + 1)
            assert torch.equal(whole[0][one], process.add_noise(CLEAN[one], NOISE[one], INDEX[one]))
            assert torch.equal(whole[1][one], process.target(CLEAN[one], NOISE[one], INDEX[one]))


# Draws


def test_diffusion_draws_uniformly_over_the_whole_schedule():
    process = process_of(build_tiny("sd").scheduler)
    share = torch.tensor([0.0, 0.0005, 0.4999, 0.5, 1 - 2**-24])
    assert process.draw(share).tolist() == [0, 0, 499, 500, 999]


def test_flow_draws_a_logistic_of_a_normal():
    _, process = flow(shift=3.0)
    # Quantiles of the standard normal: 0, 1 and -1; the logistic of 1 is .731059. The last: 5.29, .99500.
    share = torch.tensor([0.5, 0.841345, 0.158655, 0.0, 1 - 2**-24])
    assert process.draw(share).tolist() == [500, 731, 268, 0, 995]
    many = torch.rand(200_000, generator=torch.Generator().manual_seed(0))
    drawn = process.draw(many).double() / 1000
    logits = torch.logit(drawn.clamp(0.0005, 0.9995))
    assert logits.mean().abs() < 0.02 and (logits.std() - 1).abs() < 0.02
    uniform = Flow(process.sigmas, process.timesteps, logit_normal=False)
    assert uniform.draw(torch.tensor([0.0, 0.4999, 0.5, 1 - 2**-24])).tolist() == [0, 499, 500, 999]


# Which schedulers


def test_every_scheduler_of_a_model_means_the_same_process():
    kept = {**STABLE_DIFFUSION_SCHEDULE, "prediction_type": "v_prediction"}
    expected = DDPMScheduler(**kept).alphas_cumprod
    for kind in (DDPMScheduler, EulerDiscreteScheduler, EulerAncestralDiscreteScheduler, PNDMScheduler, LCMScheduler,
                 DPMSolverMultistepScheduler):  # fmt: skip
        scheduler = kind.from_config(DDIMScheduler(**kept).config)
        scheduler.set_timesteps(4)
        process = process_of(scheduler)
        assert isinstance(process, Diffusion) and process.prediction_type == "v_prediction"
        assert torch.equal(process.alphas_cumprod, expected), kind.__name__


def test_a_flow_set_to_a_few_steps_is_read_as_constructed():
    scheduler, process = flow(shift=3.0)
    scheduler.set_timesteps(4)
    again = process_of(scheduler)
    assert isinstance(again, Flow)
    assert torch.equal(again.sigmas, process.sigmas) and torch.equal(again.timesteps, process.timesteps)


def test_a_schedule_that_ends_without_signal_is_kept():
    process = process_of(
        DDIMScheduler(**DDIM, prediction_type="v_prediction", rescale_betas_zero_snr=True, timestep_spacing="trailing")
    )
    assert isinstance(process, Diffusion) and process.alphas_cumprod[-1].item() == pytest.approx(0, abs=1e-7)
    last = torch.tensor([999])
    torch.testing.assert_close(process.add_noise(CLEAN[:1], NOISE[:1], last), NOISE[:1], rtol=0, atol=1e-3)


@pytest.mark.parametrize(
    "scheduler, message",
    [
        (DDIMScheduler(**DDIM, prediction_type="sample"), "prediction_type is 'sample'; known are epsilon, v_pred"),
        (EDMEulerScheduler(), "EDMEulerScheduler is no scheduler that can be trained with"),
    ],
    ids=["sample", "edm"],
)
def test_what_cannot_be_trained_with_is_named(scheduler, message):
    with pytest.raises(UserError, match=message):
        process_of(scheduler)
