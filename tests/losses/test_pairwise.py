"""Pairwise losses: numbers worked out by hand, and the properties their papers prove."""

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest
import torch

from llmalign.losses import cdpo, dpo, inpo, ipo, irpo, rdpo, ripo, rpo, rslic, slic
from llmalign.types import PairScores
from tests.losses.loss_helpers import gradients, margin_pairs, random_pairs, swapped, tensor

EVERY_LOSS: dict[str, Callable[[PairScores], torch.Tensor]] = {
    "dpo": partial(dpo, beta=0.3),
    "cdpo": partial(cdpo, beta=0.3, flip_rate=0.2),
    "ipo": partial(ipo, tau=0.4),
    "slic": partial(slic, beta=0.13),
    "rpo": partial(rpo, beta=0.3, eta=0.5),
    "irpo": partial(irpo, beta=0.3, alpha=0.7),
    "rdpo": partial(rdpo, beta=0.3, flip_rate=0.2),
    "ripo": partial(ripo, tau=0.4, flip_rate=0.2),
    "rslic": partial(rslic, beta=0.13, flip_rate=0.2),
    "inpo": partial(inpo, eta=0.4, tau=0.1),
}
every_loss = pytest.mark.parametrize("loss", EVERY_LOSS.values(), ids=EVERY_LOSS.keys())


def assert_same(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-12)


# By hand. One pair: policy -10 and -14, reference -11 and -13, previous iterate -10.5 and -13, 4 chosen tokens.
# m = (-10 + 11) - (-14 + 13) = 1 + 1 = 2. With beta .5 the logit is 1, and softplus(-1) = ln(1 + 1/e) = ln 1.36787944
# = 0.31326169, softplus(1) = 1 + 0.31326169.
BY_HAND = [
    (partial(dpo, beta=0.5), 0.31326169),
    # .75 * 0.31326169 + .25 * 1.31326169 = 0.23494627 + 0.32831542
    (partial(cdpo, beta=0.5, flip_rate=0.25), 0.56326169),
    # tau .5: c = 1/(2 * .5) = 1, (2 - 1)^2
    (partial(ipo, tau=0.5), 1.0),
    # beta .25: 1 - .25 * 2
    (partial(slic, beta=0.25), 0.5),
    # 0.31326169 - .1 * .5 * (-10), with no length anywhere
    (partial(rpo, beta=0.5, eta=0.1), 0.81326169),
    # 0.31326169 - .1 * (-10) / 4, with no beta
    (partial(irpo, beta=0.5, alpha=0.1), 0.56326169),
    # (0.23494627 - 0.32831542) / (1 - .5) = -0.09336915 * 2
    (partial(rdpo, beta=0.5, flip_rate=0.25), -0.18673831),
    # (.75 * (2 - 1)^2 - .25 * (-2 - 1)^2) / .5 = (.75 - 2.25) / .5
    (partial(ripo, tau=0.5, flip_rate=0.25), -3.0),
    # (.75 * (1 - .5) - .25 * (1 + .5)) / .5 = (.375 - .375) / .5
    (partial(rslic, beta=0.25, flip_rate=0.25), 0.0),
    # policy 4, reference 2, last 2.5; tau/eta = .25: h = 4 - .25 * 2 - .75 * 2.5 = 1.625; 1/(2 * .4) = 1.25
    (partial(inpo, eta=0.4, tau=0.1), 0.140625),
]


@pytest.mark.parametrize(("loss", "expected"), BY_HAND, ids=[loss.func.__name__ for loss, _ in BY_HAND])
def test_one_pair_by_hand(loss, expected):
    scores = PairScores(
        chosen=tensor([-10.0]),
        rejected=tensor([-14.0]),
        ref_chosen=tensor([-11.0]),
        ref_rejected=tensor([-13.0]),
        last_chosen=tensor([-10.5]),
        last_rejected=tensor([-13.0]),
        chosen_lengths=torch.tensor([4]),
    )
    assert loss(scores).tolist() == pytest.approx([expected], abs=1e-8)


def test_a_zero_margin_by_hand():
    # At m = 0 the logistic losses are ln 2 with slope -beta/2 times what the labels are worth: 1 for dpo, 1 - 2e for
    # cdpo, 1/(1 - 2e) for rdpo. The hinges are 1 and the squares 1/(2 tau)^2, here (1/.5)^2 = 4 with slope -2 * 2.
    expected = [
        (partial(dpo, beta=0.2), math.log(2), -0.1),
        (partial(cdpo, beta=0.2, flip_rate=0.1), math.log(2), -0.08),
        (partial(cdpo, beta=0.2, flip_rate=0.5), math.log(2), 0.0),
        (partial(rdpo, beta=0.2, flip_rate=0.1), math.log(2), -0.125),
        (partial(slic, beta=0.2), 1.0, -0.2),
        (partial(rslic, beta=0.2, flip_rate=0.1), 1.0, -0.25),
        (partial(ipo, tau=0.25), 4.0, -4.0),
        (partial(ripo, tau=0.25, flip_rate=0.1), 4.0, -5.0),
    ]
    for loss, value, slope in expected:
        scores = margin_pairs([0.0])
        losses = loss(scores)
        assert losses.item() == pytest.approx(value, rel=1e-12), loss
        on_chosen, on_rejected = gradients(losses, scores.chosen, scores.rejected)
        assert on_chosen.item() == pytest.approx(slope, rel=1e-12), loss
        assert on_rejected.item() == pytest.approx(-slope, rel=1e-12), loss


@every_loss
def test_gradients_are_those_of_finite_differences(loss):
    scores = random_pairs()

    def of(chosen: torch.Tensor, rejected: torch.Tensor, base: torch.Tensor) -> torch.Tensor:
        return loss(replace(scores, chosen=chosen, rejected=rejected, base=base))

    assert torch.autograd.gradcheck(of, (scores.chosen, scores.rejected, scores.base))


@every_loss
def test_every_pair_is_on_its_own(loss):
    scores, order = random_pairs(), torch.tensor([3, 0, 5, 1, 4, 2])
    shuffled = PairScores(**{name: value[order] for name, value in vars(scores).items()})
    assert_same(loss(shuffled), loss(scores)[order])
    single = PairScores(**{name: value[2:3] for name, value in vars(scores).items()})
    assert_same(loss(single), loss(scores)[2:3])


@every_loss
def test_an_empty_batch_has_no_losses(loss):
    assert loss(PairScores(**{name: value[:0] for name, value in vars(random_pairs()).items()})).shape == (0,)


@pytest.mark.parametrize("flip_rate", [0.0, 0.1, 0.4, 0.49, tensor([0.0, 0.05, 0.2, 0.3, 0.4, 0.45])], ids=str)
@pytest.mark.parametrize(
    ("noisy", "clean"),
    [
        (partial(rdpo, beta=0.3), partial(dpo, beta=0.3)),
        (partial(ripo, tau=0.4), partial(ipo, tau=0.4)),
        (partial(rslic, beta=0.3), partial(slic, beta=0.3)),
    ],
    ids=["rdpo", "ripo", "rslic"],
)
def test_the_mean_over_flipped_labels_is_the_loss_on_clean_ones(noisy, clean, flip_rate):
    scores = random_pairs()
    kept, flipped = noisy(scores, flip_rate=flip_rate), noisy(swapped(scores), flip_rate=flip_rate)
    mean = (1 - flip_rate) * kept + flip_rate * flipped
    assert_same(mean, clean(scores))
    ours = gradients(mean, scores.chosen, scores.rejected)
    for actual, expected in zip(ours, gradients(clean(scores), scores.chosen, scores.rejected), strict=True):
        assert_same(actual, expected)


def test_cdpo_at_a_flipped_label_is_not_unbiased():
    scores = random_pairs()
    kept, flipped = (cdpo(side, beta=0.3, flip_rate=0.2) for side in (scores, swapped(scores)))
    assert not torch.allclose(0.8 * kept + 0.2 * flipped, dpo(scores, beta=0.3), rtol=1e-3)


def test_a_flip_rate_of_nought_leaves_the_loss():
    scores = random_pairs()
    pairs = [
        (cdpo(scores, beta=0.3, flip_rate=0), dpo(scores, beta=0.3)),
        (rdpo(scores, beta=0.3, flip_rate=0), dpo(scores, beta=0.3)),
        (ripo(scores, tau=0.3, flip_rate=0), ipo(scores, tau=0.3)),
        (rslic(scores, beta=0.3, flip_rate=0), slic(scores, beta=0.3)),
        (rpo(scores, beta=0.3, eta=0), dpo(scores, beta=0.3)),
        (irpo(scores, beta=0.3, alpha=0), dpo(scores, beta=0.3)),
    ]
    for actual, expected in pairs:
        assert torch.equal(actual, expected)


def test_cdpo_with_a_label_that_is_surely_wrong_is_dpo_on_the_swapped_pair():
    scores = random_pairs()
    assert_same(cdpo(scores, beta=0.3, flip_rate=1), dpo(swapped(scores), beta=0.3))


@pytest.mark.parametrize("loss", [partial(cdpo, beta=0.3), partial(rdpo, beta=0.3), partial(ripo, tau=0.3)])
def test_a_flip_rate_per_pair_is_that_pairs_own(loss):
    scores, rates = random_pairs(), [0.0, 0.1, 0.2, 0.3, 0.4, 0.45]
    together = loss(scores, flip_rate=torch.tensor(rates))  # float32, beside scores in float64
    assert together.dtype == torch.float64
    for row, rate in enumerate(torch.tensor(rates).double().tolist()):
        assert_same(together[row], loss(scores, flip_rate=rate)[row])


def test_ripo_is_ipo_with_a_larger_target():
    # With c = 1/(2 tau) and e the flip rate: target c/(1 - 2e), constant c^2 (1 - 1/(1 - 2e)^2).
    tau, rate = 0.4, 0.3
    scores, c = random_pairs(), 1 / (2 * tau)
    larger = ipo(scores, tau=tau * (1 - 2 * rate))
    assert_same(ripo(scores, tau=tau, flip_rate=rate), larger + c**2 * (1 - 1 / (1 - 2 * rate) ** 2))


def test_rdpo_weighs_a_pair_by_dpos_weight_plus_a_constant_and_has_no_floor():
    beta, rate = 0.5, 0.2
    scores = margin_pairs([-30.0, -1.0, 0.0, 2.0, 30.0, 300.0])
    on_robust, on_plain = (
        gradients(losses, scores.chosen)[0]
        for losses in (rdpo(scores, beta=beta, flip_rate=rate), dpo(scores, beta=beta))
    )
    # beta e / (1 - 2e) = .5 * .2 / .6
    assert_same(on_robust, on_plain - 1 / 6)
    assert rdpo(margin_pairs([300.0]), beta=beta, flip_rate=rate).item() == pytest.approx(-50.0, rel=1e-9)


def test_inpo_with_tau_equal_to_eta_is_ipo_against_the_reference():
    scores = random_pairs()
    ours, theirs = inpo(scores, eta=0.3, tau=0.3), ipo(scores, tau=0.3)
    assert_same(ours, theirs)
    for actual, expected in zip(
        gradients(ours, scores.chosen, scores.rejected),
        gradients(theirs, scores.chosen, scores.rejected),
        strict=True,
    ):
        assert_same(actual, expected)


def test_inpo_without_tau_is_ipo_against_the_previous_iterate():
    scores = random_pairs()
    against_last = replace(scores, ref_chosen=scores.last_chosen, ref_rejected=scores.last_rejected)
    assert_same(inpo(scores, eta=0.3, tau=0), ipo(against_last, tau=0.3))


def test_rpo_without_a_base_sample_takes_the_chosen_response():
    scores = random_pairs()
    without = rpo(replace(scores, base=None), beta=0.3, eta=0.5)
    assert_same(without, rpo(replace(scores, base=scores.chosen), beta=0.3, eta=0.5))
    assert not torch.allclose(without, rpo(scores, beta=0.3, eta=0.5))


def test_every_loss_but_rpo_and_irpo_reads_margins_alone():
    scores = random_pairs()
    moved = replace(scores, chosen=scores.chosen + 5, rejected=scores.rejected + 5)
    for name, loss in EVERY_LOSS.items():
        if name not in ("rpo", "irpo"):
            assert_same(loss(moved), loss(scores))
    # .7 * 5 / length apart
    apart = irpo(scores, beta=0.3, alpha=0.7) - irpo(moved, beta=0.3, alpha=0.7)
    assert_same(apart, 3.5 / scores.chosen_lengths.double())


def test_logistic_gradients_keep_their_precision_in_the_tails():
    # 1 - sigmoid(-21) is 7.6e-10: a softplus that turns into the identity beyond 20 has exactly slope 1 there.
    scores = margin_pairs([-21.0, 21.0])
    (on_chosen,) = gradients(dpo(scores, beta=1.0), scores.chosen)
    assert 1 + on_chosen[0].item() == pytest.approx(math.exp(-21), rel=1e-6)
    assert on_chosen[1].item() == pytest.approx(-math.exp(-21) / (1 + math.exp(-21)), rel=1e-12)


@pytest.mark.parametrize("loss", ["dpo", "cdpo", "rdpo", "rpo", "irpo", "slic", "rslic"])
def test_float32_survives_margins_of_thousands_of_nats(loss):
    far = torch.tensor([-4e4, 4e4, -1e6, 1e6], requires_grad=True)
    zeros = torch.zeros(4)
    losses = EVERY_LOSS[loss](PairScores(far, zeros, zeros, zeros, chosen_lengths=torch.ones(4)))
    assert torch.isfinite(losses).all()
    assert torch.isfinite(gradients(losses, far)[0]).all()
