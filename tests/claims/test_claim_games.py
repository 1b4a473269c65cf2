"""The games: duality gaps and iterates against numbers worked out independently."""

import pytest
import torch
from claims import inpo_classes, inpo_exact
from claims.game import Game, all_comparisons, exploitability, fit, gap

# Iterates and duality gaps of INPO (eta .6, tau .2) on the four-action game (numpy, float64).
GAPS = [
    0.028433580777589562, 0.01353516036041652, 0.006358823126975055, 0.003020361746490563, 0.001460432442213333,
    0.0007129611183500084, 0.0003475035900409318, 0.0001682817681095683, 8.113009974425323e-05,
]  # fmt: skip
LAST = [0.1485308733448773, 0.3139762359602784, 0.26311209495982657, 0.27438079573501756]
NASH = [0.15084249646575323, 0.3089710147387551, 0.269359137535583, 0.27082735125990854]


@pytest.mark.parametrize("method", ["closed_form", "loss"])
def test_inpo_on_the_exact_game(method: str) -> None:
    policies = inpo_exact.iterate(method, inpo_exact.GAME, 8, {"eta": 0.6})
    assert [gap(p, inpo_exact.GAME) for p in policies] == pytest.approx(GAPS, abs=1e-8)
    assert policies[-1].exp().tolist() == pytest.approx(LAST, abs=1e-8)


def test_the_gap_is_zero_at_the_nash_policy() -> None:
    nash = torch.tensor(NASH, dtype=torch.float64)
    assert gap((nash / nash.sum()).log(), inpo_exact.GAME) == pytest.approx(0.0, abs=1e-12)


def test_the_gap_is_the_best_response_found_by_search() -> None:
    """A grid over policies of two actions cannot beat the closed form, and comes close to it."""
    game = Game(
        beats=torch.tensor([[0.5, 0.9], [0.1, 0.5]], dtype=torch.float64),
        reference=torch.tensor([0.3, 0.7], dtype=torch.float64),
        tau=0.4,
    )
    policy = torch.tensor([0.6, 0.4], dtype=torch.float64)

    def kl(p: torch.Tensor) -> torch.Tensor:
        return (p * (p / game.reference).log()).sum()

    def payoff(p: torch.Tensor) -> float:
        return float(p @ game.beats @ policy - game.tau * kl(p) + game.tau * kl(policy))

    grid = torch.linspace(0.001, 0.999, 2000, dtype=torch.float64)
    best = max(payoff(torch.stack([x, 1 - x])) for x in grid)
    assert gap(policy.log(), game) == pytest.approx(2 * best - 1, abs=1e-5)


def test_exploitability_by_hand() -> None:
    """All mass on one class of the cycle: the class that beats it wins .8, so the gap is .8 - .2."""
    alone = torch.tensor([1.0, 1e-300, 1e-300, 1e-300], dtype=torch.float64).log()
    assert exploitability(alone, inpo_classes.CYCLE) == pytest.approx(0.6)


def test_expected_labels_weigh_to_one_with_ties_left_out() -> None:
    policy = inpo_exact.GAME.reference.log()
    data = all_comparisons(policy, inpo_exact.GAME)
    same = policy.exp().square().sum()
    # An unordered pair is drawn in two orders, a comparison of an action with itself in one.
    assert float(2 * data.weight.sum() + same) == pytest.approx(1.0)
    assert not (data.chosen == data.rejected).any()


def test_an_action_that_was_never_compared_stays_where_it_was() -> None:
    data = inpo_classes.sample_comparisons(
        torch.tensor([0.5, 0.5, 1e-30, 1e-30], dtype=torch.float64).log(), 64, "all", torch.Generator().manual_seed(0)
    )
    assert set(data.chosen.tolist()) <= {0, 1}
    start = torch.full((4,), 0.25, dtype=torch.float64).log()
    fitted = fit("inpo", start, start, data, {"eta": 0.3, "tau": 0.1, "ridge": 1e-4})
    assert float(fitted[2] - fitted[3]) == pytest.approx(0.0, abs=1e-6)


def test_sampled_labels_follow_the_preference() -> None:
    rng = torch.Generator().manual_seed(0)
    data = inpo_classes.sample_comparisons(inpo_classes.START.log(), 8000, "all", rng)
    animal_over_food = ((data.chosen == 0) & (data.rejected == 1)).sum()
    food_over_animal = ((data.chosen == 1) & (data.rejected == 0)).sum()
    assert float(animal_over_food / (animal_over_food + food_over_animal)) == pytest.approx(0.8, abs=0.03)


def test_best_and_worst_of_eight_come_from_one_group() -> None:
    draws = torch.tensor([[0, 0, 0, 0, 0, 0, 0, 3]] * 400)
    best, worst = inpo_classes.best_and_worst(draws, inpo_classes.CYCLE, torch.Generator().manual_seed(0))
    # The lone bad answer loses to a good one at .8, so it is mostly the worst and seldom the best.
    assert (worst == 3).float().mean() > 0.45
    assert (best == 3).float().mean() < 0.1
