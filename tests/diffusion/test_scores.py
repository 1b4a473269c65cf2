"""Denoising errors as scores: recorded vectors of Diffusion-DPO through process, scores and loss; identities."""

import math
from dataclasses import fields, replace

import pytest
import torch

from llmalign.diffusion.process import Diffusion, Flow
from llmalign.diffusion.scores import PairErrors, denoising_errors, pair_scores
from llmalign.losses import dpo
from tests.diffusion.vectors import ALPHAS, VECTORS, assert_recorded, seq, tensor

ERRORS = ("err_w", "err_l", "ref_err_w", "ref_err_l")
SCALAR = VECTORS["diffusion_dpo_scalar"]
TENSOR = VECTORS["diffusion_dpo_tensor"]


def recorded_errors(case: dict, grad: bool = False) -> PairErrors:
    return PairErrors(*(tensor(case[name], grad=grad) for name in ERRORS))


# Recorded vectors


@pytest.mark.parametrize("case", SCALAR, ids=lambda case: f"beta{case['beta_dpo']:g}")
def test_recorded_errors_through_the_loss(case):
    errors = recorded_errors(case, grad=True)
    scores = pair_scores(errors)
    losses = dpo(scores, beta=case["beta_dpo"])
    assert_recorded(losses, case["per_sample"])
    assert_recorded(losses.mean(), case["loss"])
    assert_recorded(case["beta_dpo"] * (scores.chosen - scores.ref_chosen), case["reward_chosen"])
    assert_recorded(case["beta_dpo"] * (scores.rejected - scores.ref_rejected), case["reward_rejected"])
    on_chosen, on_rejected = torch.autograd.grad(losses.mean(), (errors.chosen, errors.rejected))
    assert_recorded(on_chosen, case["dloss_derr_w"])
    assert_recorded(on_rejected, case["dloss_derr_l"])


@pytest.mark.parametrize("case", SCALAR[1:], ids=lambda case: f"beta{case['beta_dpo']:g}")
def test_the_mean_over_pairs_is_outside_of_the_logistic(case):
    scores = pair_scores(recorded_errors(case))
    margin = (scores.chosen - scores.ref_chosen) - (scores.rejected - scores.ref_rejected)
    inside = torch.nn.functional.softplus(-case["beta_dpo"] * margin.mean())
    assert_recorded(inside, case["loss_wrong_mean_inside"])
    assert dpo(scores, beta=case["beta_dpo"]).mean() > 1.4 * inside


@pytest.mark.parametrize("case", TENSOR, ids=lambda case: case["kind"])
def test_recorded_latents_through_the_process(case):
    if case["kind"] == "flow":
        sigmas = tensor(case["sigmas"])
        process, index = Flow(sigmas, 1000 * sigmas), torch.arange(2)
    else:
        process, index = Diffusion(ALPHAS, case["kind"]), torch.tensor(case["timesteps"])
    noise = seq("seq(2,1,2,2,k=2.3,s=1.2)")
    slope, offset = tensor(0.35, grad=True), tensor(0.02, grad=True)

    def errors_of(clean: str, by: torch.Tensor | float, plus: torch.Tensor | float) -> torch.Tensor:
        latents = seq(clean)
        prediction = by * process.add_noise(latents, noise, index) + plus
        return denoising_errors(prediction, process.target(latents, noise, index))

    policy = [errors_of(case[side], slope, offset) for side in ("x0_w", "x0_l")]
    reference = [errors_of(case[side], 0.30, -0.05) for side in ("x0_w", "x0_l")]
    for found, name in zip((*policy, *reference), ERRORS, strict=True):
        assert_recorded(found, case[name])
    scores = pair_scores(PairErrors(*policy, *reference))
    margin = (scores.chosen - scores.ref_chosen) - (scores.rejected - scores.ref_rejected)
    assert_recorded(case["beta_dpo"] * margin, case["logits"])
    loss = dpo(scores, beta=case["beta_dpo"]).mean()
    assert_recorded(loss, case["loss"])
    on_slope, on_offset = torch.autograd.grad(loss, (slope, offset))
    assert_recorded(on_slope, case["dloss_da"])
    assert_recorded(on_offset, case["dloss_db"])


# Identities between the parametrisations


def random(*size: int) -> torch.Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(sum(size)), dtype=torch.float64)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "flow"])
def test_weighted_errors_are_those_of_the_noise(kind):
    if kind == "flow":
        sigmas = torch.linspace(1, 0.001, 1000, dtype=torch.float64)
        process: Diffusion | Flow = Flow(sigmas, 1000 * sigmas)
    else:
        process = Diffusion(ALPHAS, kind)
    index = torch.tensor([1, 250, 749, 998])
    clean, noise, prediction = random(4, 2, 3), random(4, 3, 2).reshape(4, 2, 3), random(4, 2, 3) + 0.5
    noisy = process.add_noise(clean, noise, index)
    errors = denoising_errors(prediction, process.target(clean, noise, index))
    of_noise = (process.noise(prediction, noisy, index) - noise).square().flatten(1).mean(1)
    torch.testing.assert_close(process.noise_weight(index) * errors, of_noise, rtol=1e-10, atol=0)
    if kind == "flow":
        of_clean = (process.clean(prediction, noisy, index) - clean).square().flatten(1).mean(1)
        torch.testing.assert_close(sigmas[index].square() * errors, of_clean, rtol=1e-10, atol=0)
    elif kind == "v_prediction":  # (1 + 1/SNR) |eps error|^2
        snr = ALPHAS[index] / (1 - ALPHAS[index])
        torch.testing.assert_close(errors, (1 + 1 / snr) * of_noise, rtol=1e-10, atol=0)


def test_scores_of_sums_at_beta_over_d_are_scores_of_means_at_beta():
    dimensions, means = 64, recorded_errors(SCALAR[1])
    summed, mean = pair_scores(means, scale=dimensions), pair_scores(means)
    torch.testing.assert_close(summed.chosen, 64 * mean.chosen, rtol=1e-12, atol=0)
    torch.testing.assert_close(dpo(summed, beta=2000 / dimensions), dpo(mean, beta=2000), rtol=1e-9, atol=1e-12)


# Errors


def test_an_error_is_the_mean_over_the_latent_of_squares():
    target = torch.tensor([[[[1.0, -2.0], [3.0, 0.0]]], [[[0.0, 0.0], [0.0, 4.0]]]])
    assert denoising_errors(torch.zeros(2, 1, 2, 2), target).tolist() == [14 / 4, 16 / 4]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_widened_before_it_is_squared(dtype):
    # 1.0078125 = 1 + 2^-7 is a number of both; its square, 1.01568603515625, is one of neither.
    prediction, target = torch.full((1, 2), 1.0078125, dtype=dtype), torch.zeros(1, 2, dtype=dtype)
    errors = denoising_errors(prediction, target)
    assert errors.dtype == torch.float32 and errors.item() == 1.01568603515625
    # So is the difference: 16 - 1.0078125 is 15 in bfloat16, and has a square that is not one of float16.
    assert denoising_errors(torch.full((1, 2), 16.0, dtype=dtype), prediction).item() == 14.9921875**2


def test_a_float64_side_keeps_the_error_in_float64():
    assert denoising_errors(torch.zeros(1, 2), torch.ones(1, 2, dtype=torch.float64)).dtype == torch.float64


def test_what_is_not_given_stays_out_and_the_previous_iterate_is_scored_alike():
    errors = recorded_errors(SCALAR[0])
    assert pair_scores(errors).last_chosen is None and pair_scores(errors).last_rejected is None
    with_last = pair_scores(replace(errors, last_chosen=errors.ref_chosen, last_rejected=errors.ref_rejected), scale=3)
    assert torch.equal(with_last.last_chosen, with_last.ref_chosen)
    assert torch.equal(with_last.last_rejected, with_last.ref_rejected)
    given = {name: tensor([float(place)]) for place, name in enumerate(entry.name for entry in fields(PairErrors))}
    scores = pair_scores(PairErrors(**given), scale=3)
    for name, error in given.items():
        assert getattr(scores, name).item() == -1.5 * error.item(), name


def test_a_pair_at_the_reference_has_loss_log_2():
    errors = recorded_errors(SCALAR[1])
    start = replace(errors, ref_chosen=errors.chosen, ref_rejected=errors.rejected)
    assert dpo(pair_scores(start), beta=5000).tolist() == pytest.approx([math.log(2)] * 4, rel=1e-15)
