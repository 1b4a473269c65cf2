"""The bandit with expected gradients against numbers worked out independently, and the properties of its parts."""

import itertools
import math

import pytest
import torch
from claims import bandit

# Regret under expected gradients, Adam 1e-3 from uniform, after so many steps (numpy, float64).
EXPECTED = {
    "copg": {100: 0.24102362101545394, 500: 0.11789633556745782, 1000: 0.058935215358809856},
    "ipo": {100: 0.24353766728761395, 500: 0.16526428559820316, 1000: 0.1530372114489824},
    "pg": {100: 0.3488125581056716, 500: 0.5357905883087983, 1000: 0.6218252985700965},
    "pg_reward": {100: 0.2401616822952326, 500: 0.10914486552623481, 1000: 0.058583261171987644},
}


@pytest.mark.parametrize("method", EXPECTED)
def test_population_regret(method: str) -> None:
    curve = bandit.train(method, itertools.repeat(bandit.population()), steps=1000, every=100)
    for step, regret in EXPECTED[method].items():
        assert curve[step] == pytest.approx(regret, rel=1e-6)


def test_regret_at_the_start_and_at_the_optimum() -> None:
    assert bandit.regret(bandit.LOG_REFERENCE) == pytest.approx(0.29186663071670416, abs=1e-12)
    optimum = torch.tensor([0.705384512698241, 0.2594964603424191, 0.035119026959339716], dtype=torch.float64)
    assert bandit.regret(optimum.log()) == pytest.approx(0.0, abs=1e-12)
    assert float(bandit.value(optimum.log())) == pytest.approx(2.1251999640500374, abs=1e-12)


@pytest.mark.parametrize("method", ["copg", "pg_regularised"])
def test_the_optimum_is_a_fixed_point_of_the_two_that_converge(method: str) -> None:
    """At pi* the regularised reward of every arm is J(pi*): no pair and no arm is pulled, whatever the sampling."""
    logits = (bandit.LOG_REFERENCE + bandit.REWARD / bandit.BETA).requires_grad_()
    bandit.objective(method, torch.log_softmax(logits, 0), next(bandit.sampled(512, 64, 0))).backward()
    assert logits.grad.abs().max() < 1e-12


def test_ipo_is_pulled_away_from_the_optimum() -> None:
    logits = (bandit.LOG_REFERENCE + bandit.REWARD / bandit.BETA).requires_grad_()
    bandit.objective("ipo", torch.log_softmax(logits, 0), bandit.population()).backward()
    assert logits.grad.abs().max() > 1e-2


def test_sampled_pairs_are_fixed_shuffled_and_of_the_right_shares() -> None:
    batches = bandit.sampled(10_000, 512, 1)
    first_epoch = [next(batches) for _ in range(20)]
    second_epoch = [next(batches) for _ in range(20)]
    assert [len(b.first) for b in first_epoch] == [512] * 19 + [272]
    for epoch in (first_epoch, second_epoch):
        assert all(math.isclose(float(b.weight.sum()), 1.0) for b in epoch)

    def rows(epoch: list[bandit.Batch]) -> torch.Tensor:
        return torch.cat([torch.stack([b.first, b.second, b.first_wins.long()], 1) for b in epoch])

    counts = [rows(epoch).unique(dim=0, return_counts=True)[1] for epoch in (first_epoch, second_epoch)]
    assert torch.equal(*counts)
    assert not torch.equal(rows(first_epoch), rows(second_epoch))
    shares = rows(first_epoch)[:, 0].bincount() / 10_000
    assert torch.allclose(shares, bandit.FIRST.float(), atol=0.02)
