"""Importance-sampled divergences to a target: recorded numbers, and the exact values on a finite space."""

import json
import math
from pathlib import Path

import pytest
import torch

from llmalign.evaluation.divergence import target_metrics, target_terms

RECORDED = json.loads((Path(__file__).parents[1] / "data" / "on-policy-losses.json").read_text())["fdpg"]
NAMES = {
    "KL(p||pi)": "kl_p_pi",
    "KL(pi||p)": "kl_pi_p",
    "TV(p,pi)": "tv",
    "JS(p,pi)": "js",
    "KL(pi||a)": "kl_pi_base",
    "entropy(pi)": "entropy",
}


def tensor(values: object) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


POLICY, BASE = tensor(RECORDED["space"]["policy"]).log(), tensor(RECORDED["space"]["a"]).log()
PROPOSAL = tensor(RECORDED["metrics"]["proposal_q"]).log()
TARGET = tensor(RECORDED["targets"]["rlhf"]["p"]).log()


def test_samples_against_the_recorded_numbers():
    rows = RECORDED["metrics"]["sample_indices"]
    found = target_metrics(POLICY[rows], PROPOSAL[rows], TARGET[rows], BASE[rows])
    for name, expected in RECORDED["metrics"]["is_estimates"].items():
        assert found[NAMES[name]] == pytest.approx(expected, rel=1e-9), name


@pytest.mark.parametrize("proposal", [PROPOSAL, POLICY, BASE], ids=["q", "policy", "base"])
def test_the_expected_terms_are_the_exact_divergences(proposal):
    terms = target_terms(POLICY, proposal, TARGET, BASE)
    for name, expected in RECORDED["metrics"]["exact"].items():
        assert (proposal.exp() * terms[NAMES[name]]).sum().item() == pytest.approx(expected, rel=1e-9), name
    assert (proposal.exp() * terms["weight"]).sum().item() == pytest.approx(1)


def test_a_target_that_is_nought_somewhere():
    """p = (0, 1), pi = (1/4, 3/4), by hand, with pi as the proposal."""
    policy, p = tensor([0.25, 0.75]).log(), tensor([-math.inf, 0.0])
    found = {name: float((policy.exp() * terms).sum()) for name, terms in target_terms(policy, policy, p).items()}
    assert found["kl_p_pi"] == pytest.approx(-math.log(0.75))
    assert found["kl_pi_p"] == math.inf
    assert found["tv"] == pytest.approx(0.25)
    # m = (1/8, 7/8): KL(p||m) = log(8/7), KL(pi||m) = log(2)/4 + 3/4 log(6/7).
    expected = math.log(8 / 7) / 2 + (math.log(2) / 4 + 0.75 * math.log(6 / 7)) / 2
    assert found["js"] == pytest.approx(expected)
    assert "kl_pi_base" not in found


def test_features_are_weighted_to_the_policy():
    """Each of two outcomes as often as the proposal draws it: 3 to 1; pi is 1 to 1."""
    rows, log_half = [0, 0, 0, 1], math.log(0.5)
    policy, proposal = tensor([log_half, log_half])[rows], tensor([0.75, 0.25]).log()[rows]
    found = target_metrics(policy, proposal, policy, features=tensor([[1.0, 0.0], [0.0, 1.0]])[rows])
    assert (found["satisfied_0"], found["satisfied_1"]) == (pytest.approx(0.5), pytest.approx(0.5))
    assert found["weight"] == pytest.approx(1) and found["js"] == pytest.approx(0)


def test_no_gradient_and_double_precision():
    policy = torch.tensor([-1.0, -2.0], requires_grad=True)
    terms = target_terms(policy, policy, policy)
    assert all(value.dtype == torch.float64 and not value.requires_grad for value in terms.values())


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (
            (torch.zeros(2), torch.zeros(3), torch.zeros(2)),
            r"proposal must have the shape of policy, \(2,\), got \(3,\)",
        ),
        ((torch.zeros(2), torch.zeros(2), torch.zeros(2), torch.zeros(1)), "base must have the shape of policy"),
        ((torch.zeros(0), torch.zeros(0), torch.zeros(0)), "at least one sample"),
        (
            (torch.zeros(2), torch.zeros(2), torch.zeros(2), None, torch.zeros(3, 1)),
            r"features must have shape \(2, K\)",
        ),
    ],
)
def test_what_is_refused(arguments, sentence):
    with pytest.raises(ValueError, match=sentence):
        target_metrics(*arguments)
