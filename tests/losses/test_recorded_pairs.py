"""Pairwise losses against numbers computed from the formulas alone, in float64: values and gradients."""

import pytest
import torch

from llmalign.losses import cdpo, dpo, inpo, ipo, irpo, rdpo, ripo, rpo, rslic, slic
from llmalign.types import PairScores
from tests.losses.loss_helpers import DTYPES, VECTORS, assert_recorded, gradients, recorded_pairs, tensor


def check(losses: torch.Tensor, scores: PairScores, expected: dict, dtype: torch.dtype) -> None:
    on_chosen, on_rejected = gradients(losses, scores.chosen, scores.rejected)
    assert_recorded(losses.detach(), expected["loss"], dtype)
    assert_recorded(on_chosen, expected["grad_policy_chosen"], dtype)
    assert_recorded(on_rejected, expected["grad_policy_rejected"], dtype)
    if "batch_loss" in expected and dtype == torch.float64:
        assert losses.mean().item() == pytest.approx(expected["batch_loss"], rel=1e-9)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", VECTORS["rpo"]["cases"], ids=lambda case: f"beta{case['beta']}-eta{case['eta']}")
def test_dpo_rpo_and_irpo(case, dtype):
    scores, beta, eta = recorded_pairs("rpo", dtype), case["beta"], case["eta"]
    check(dpo(scores, beta=beta), scores, case["dpo"], dtype)
    check(rpo(scores, beta=beta, eta=eta), scores, case["rpo_sum"], dtype)
    check(irpo(scores, beta=beta, alpha=eta), scores, case["rpo_seqmean"], dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", VECTORS["rdpo"]["cases"], ids=lambda case: f"beta{case['beta']}-flips{case['eps']}")
def test_losses_under_flipped_labels(case, dtype):
    scores, beta, rate = recorded_pairs("rdpo", dtype), case["beta"], case["eps"]
    tau = case["ripo_unnormalised"]["tau"]
    check(rdpo(scores, beta=beta, flip_rate=rate), scores, case["rdpo"], dtype)
    check(cdpo(scores, beta=beta, flip_rate=rate), scores, case["cdpo"], dtype)
    check(ripo(scores, tau=tau, flip_rate=rate), scores, case["ripo_unnormalised"], dtype)
    check(rslic(scores, beta=beta, flip_rate=rate), scores, case["rslic"], dtype)
    (on_chosen,) = gradients(rdpo(scores, beta=beta, flip_rate=rate), scores.chosen)
    assert_recorded(on_chosen / -beta, case["rdpo"]["grad_weight_zeta"], dtype)
    if rate == 0:
        check(ipo(scores, tau=tau), scores, case["ripo_unnormalised"], dtype)
        check(slic(scores, beta=beta), scores, case["rslic"], dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", VECTORS["inpo"]["cases"], ids=lambda case: f"eta{case['eta']}-tau{case['tau']:.3g}")
def test_inpo(case, dtype):
    scores = recorded_pairs("inpo", dtype)
    check(inpo(scores, eta=case["eta"], tau=case["tau"]), scores, case, dtype)


def test_gradients_of_the_base_term_reach_every_token_of_the_chosen_response():
    case = VECTORS["rpo"]["token_level_sft_term"]
    tokens, mask = tensor(case["per_token_logps"], grad=True), tensor(case["completion_mask"])
    zeros = torch.zeros(3, dtype=torch.float64)
    scores = PairScores((tokens * mask).sum(1), zeros, zeros, zeros, chosen_lengths=mask.sum(1))
    preference = dpo(scores, beta=case["beta"])

    summed = rpo(scores, beta=case["beta"], eta=case["eta"]) - preference
    torch.testing.assert_close(summed, tensor(case["sft_sum_per_seq"]), rtol=1e-9, atol=0)
    assert summed.mean().item() == pytest.approx(case["sft_sum_batch"], rel=1e-9)
    (on_tokens,) = torch.autograd.grad(summed.mean(), tokens, retain_graph=True)
    torch.testing.assert_close(on_tokens, tensor(case["grad_token_sum_batch"]), rtol=1e-9, atol=1e-18)

    averaged = (irpo(scores, beta=case["beta"], alpha=case["eta"]) - preference).mean()
    assert averaged.item() == pytest.approx(case["sft_seqmean_batch"], rel=1e-9)
    (on_tokens,) = torch.autograd.grad(averaged, tokens)
    torch.testing.assert_close(on_tokens, tensor(case["grad_token_seqmean_batch"]), rtol=1e-9, atol=1e-18)


def test_a_base_sample_takes_the_place_of_the_chosen_response():
    case = VECTORS["rpo"]["base_sample_term"]
    base = tensor(case["policy_logp_of_base_sample"], grad=True)
    chosen, rest = torch.full((3,), -7.0, dtype=torch.float64, requires_grad=True), torch.zeros(3, dtype=torch.float64)
    scores = PairScores(chosen, rest, rest, rest, base=base)
    term = rpo(scores, beta=case["beta"], eta=case["eta"]) - dpo(scores, beta=case["beta"])
    on_base, on_chosen = gradients(term, base, chosen)
    torch.testing.assert_close(term, tensor(case["sft_term_per_prompt"]), rtol=1e-9, atol=0)
    torch.testing.assert_close(on_base, tensor(case["grad_policy_logp_of_base_sample"]), rtol=1e-9, atol=0)
    torch.testing.assert_close(on_chosen, torch.zeros_like(on_chosen), rtol=0, atol=1e-15)
