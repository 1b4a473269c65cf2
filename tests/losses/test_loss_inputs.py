"""Bad input to the losses: one sentence that names what is wrong."""

import inspect
from dataclasses import FrozenInstanceError, replace
from functools import partial

import pytest
import torch

from llmalign import losses
from llmalign.losses import cdpo, copg, dpo, inpo, ipo, irpo, rdpo, ripo, rpo, rslic, slic
from llmalign.types import GroupScores, PairScores
from tests.losses.loss_helpers import random_pairs, tensor

NAN, INF = float("nan"), float("inf")
GROUP = GroupScores(*torch.zeros(3, 2, 4, dtype=torch.float64).unbind())
# name -> (a call with that one value left open, everything else in order)
POSITIVE = {
    "dpo-beta": ("beta", lambda value: dpo(random_pairs(), beta=value)),
    "cdpo-beta": ("beta", lambda value: cdpo(random_pairs(), beta=value, flip_rate=0.1)),
    "ipo-tau": ("tau", lambda value: ipo(random_pairs(), tau=value)),
    "slic-beta": ("beta", lambda value: slic(random_pairs(), beta=value)),
    "rpo-beta": ("beta", lambda value: rpo(random_pairs(), beta=value, eta=0.1)),
    "irpo-beta": ("beta", lambda value: irpo(random_pairs(), beta=value, alpha=0.1)),
    "rdpo-beta": ("beta", lambda value: rdpo(random_pairs(), beta=value, flip_rate=0.1)),
    "ripo-tau": ("tau", lambda value: ripo(random_pairs(), tau=value, flip_rate=0.1)),
    "rslic-beta": ("beta", lambda value: rslic(random_pairs(), beta=value, flip_rate=0.1)),
    "inpo-eta": ("eta", lambda value: inpo(random_pairs(), eta=value, tau=0.1)),
    "copg-beta": ("beta", lambda value: copg(GROUP, beta=value)),
}
NOT_NEGATIVE = {
    "rpo-eta": ("eta", lambda value: rpo(random_pairs(), beta=0.1, eta=value)),
    "irpo-alpha": ("alpha", lambda value: irpo(random_pairs(), beta=0.1, alpha=value)),
    "inpo-tau": ("tau", lambda value: inpo(random_pairs(), eta=0.1, tau=value)),
}
# Those that take a dataclass of scores; the on-policy ones take tensors, in the order of their papers.
LOSSES_OF_SCORES = [name for name in losses.__all__ if "scores" in getattr(vars(losses)[name], "__annotations__", {})]
ROBUST = {"rdpo": partial(rdpo, beta=0.1), "ripo": partial(ripo, tau=0.1), "rslic": partial(rslic, beta=0.1)}


@pytest.mark.parametrize("value", [0, 0.0, -0.1, NAN, INF, -INF, "0.1", None, True, torch.tensor(0.1)], ids=repr)
@pytest.mark.parametrize(("name", "call"), POSITIVE.values(), ids=POSITIVE.keys())
def test_what_must_be_positive(name, call, value):
    with pytest.raises(ValueError, match=rf"^{name} must be a finite number above 0, got .*\.$"):
        call(value)


@pytest.mark.parametrize("value", [-1e-9, -1, NAN, INF, -INF, "0", None, False], ids=repr)
@pytest.mark.parametrize(("name", "call"), NOT_NEGATIVE.values(), ids=NOT_NEGATIVE.keys())
def test_what_must_not_be_negative(name, call, value):
    with pytest.raises(ValueError, match=rf"^{name} must be a finite number of at least 0, got .*\.$"):
        call(value)


@pytest.mark.parametrize(("name", "call"), NOT_NEGATIVE.values(), ids=NOT_NEGATIVE.keys())
def test_nought_is_allowed_there(name, call):
    assert torch.isfinite(call(0)).all()


@pytest.mark.parametrize("value", [0.5, 0.7, 1, -0.01, NAN, INF, "0.1", None, True], ids=repr)
@pytest.mark.parametrize("loss", ROBUST.values(), ids=ROBUST.keys())
def test_flip_rate_of_the_noise_corrected_losses(loss, value):
    with pytest.raises(ValueError, match=r"^flip_rate must lie in \[0, 0\.5\), got .*\.$"):
        loss(random_pairs(), flip_rate=value)


@pytest.mark.parametrize("value", [-0.01, 1.01, NAN, INF, "0.1"], ids=repr)
def test_flip_rate_of_cdpo(value):
    with pytest.raises(ValueError, match=r"^flip_rate must lie in \[0, 1\], got .*\.$"):
        cdpo(random_pairs(), beta=0.1, flip_rate=value)


@pytest.mark.parametrize("value", [0.5, 0.50001, -0.1, NAN, INF])
@pytest.mark.parametrize("loss", ROBUST.values(), ids=ROBUST.keys())
def test_flip_rates_by_pair_name_the_pair(loss, value):
    rates = tensor([0.1, 0.2, 0.3, value, 0.0, 0.4])
    with pytest.raises(ValueError, match=r"^flip_rate must lie in \[0, 0\.5\) for every pair, but pair 3 has "):
        loss(random_pairs(), flip_rate=rates)


def test_flip_rates_are_judged_as_the_losses_will_see_them():
    # Below one half in float64, one half itself in the float32 of these scores.
    rates = torch.full((2,), 0.5 - 1e-12, dtype=torch.float64)
    scores = PairScores(*torch.zeros(4, 2).unbind())
    with pytest.raises(ValueError, match="pair 0 has 0.5"):
        rdpo(scores, beta=0.1, flip_rate=rates)


def test_cdpo_takes_a_soft_label_per_pair():
    rates = tensor([0.0, 0.5, 1.0, 0.2, 0.3, 0.9])
    assert torch.isfinite(cdpo(random_pairs(), beta=0.1, flip_rate=rates)).all()
    rates[2] = 1.5
    with pytest.raises(ValueError, match=r"^flip_rate must lie in \[0, 1\] for every pair, but pair 2 has 1\.5\.$"):
        cdpo(random_pairs(), beta=0.1, flip_rate=rates)


@pytest.mark.parametrize("shape", [(), (5,), (6, 1)])
def test_flip_rates_of_another_shape(shape):
    with pytest.raises(ValueError, match=r"^flip_rate must be one number or a tensor of shape \(6,\), got shape"):
        rdpo(random_pairs(), beta=0.1, flip_rate=torch.full(shape, 0.1))


@pytest.mark.parametrize("missing", ["last_chosen", "last_rejected"])
def test_inpo_without_the_previous_iterate(missing):
    with pytest.raises(ValueError, match=r"^inpo needs scores\.last_chosen and scores\.last_rejected, "):
        inpo(replace(random_pairs(), **{missing: None}), eta=0.1, tau=0.1)


def test_irpo_without_lengths_or_with_an_empty_completion():
    with pytest.raises(ValueError, match=r"^irpo needs scores\.chosen_lengths, "):
        irpo(replace(random_pairs(), chosen_lengths=None), beta=0.1, alpha=1)
    with pytest.raises(ValueError, match="^chosen_lengths must be above 0: "):
        irpo(replace(random_pairs(), chosen_lengths=torch.tensor([3, 1, 0, 2, 4, 5])), beta=0.1, alpha=1)


FIELDS = ["rejected", "ref_chosen", "ref_rejected", "last_chosen", "last_rejected", "base"]


@pytest.mark.parametrize("field", [*FIELDS, "chosen_lengths", "rejected_lengths"])
@pytest.mark.parametrize("shape", [(), (1,), (5,), (6, 1)])
def test_a_field_of_another_shape_is_named_and_never_broadcast(field, shape):
    scores = replace(random_pairs(), **{field: torch.ones(shape, dtype=torch.float64)})
    for loss in (partial(dpo, beta=0.1), partial(inpo, eta=0.1, tau=0.1)):
        with pytest.raises(ValueError, match=rf"^{field} must have the shape of chosen, \(6,\), got "):
            loss(scores)


@pytest.mark.parametrize("field", FIELDS)
def test_a_field_of_another_dtype_is_named(field):
    scores = replace(random_pairs(), **{field: torch.zeros(6)})
    with pytest.raises(ValueError, match=rf"^{field} must have the dtype of chosen, torch.float64, got torch.float32"):
        dpo(scores, beta=0.1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.int64], ids=str)
def test_dtypes_that_lose_nats_are_refused(dtype):
    with pytest.raises(ValueError, match="^chosen must be float32 or float64, got torch"):
        dpo(PairScores(*torch.zeros(4, 3, dtype=dtype).unbind()), beta=0.1)
    with pytest.raises(ValueError, match="^policy must be float32 or float64, got torch"):
        copg(GroupScores(*torch.zeros(3, 2, 4, dtype=dtype).unbind()), beta=0.1)


def test_pairs_and_groups_of_the_wrong_dimensions():
    with pytest.raises(ValueError, match=r"^chosen must have shape \(B,\), got \(3, 2\)\.$"):
        dpo(PairScores(*torch.zeros(4, 3, 2).unbind()), beta=0.1)
    with pytest.raises(ValueError, match=r"^policy must have shape \(P, K\), got \(4,\)\.$"):
        copg(GroupScores(*torch.zeros(3, 4).unbind()), beta=0.1)


@pytest.mark.parametrize("field", ["reference", "rewards", "mask"])
def test_groups_of_unequal_shape(field):
    with pytest.raises(ValueError, match=rf"^{field} must have the shape of policy, \(2, 4\), got \(2, 1\)\.$"):
        copg(replace(GROUP, **{field: torch.ones(2, 1, dtype=torch.float64)}), beta=0.1)


def test_rewards_of_another_dtype():
    with pytest.raises(ValueError, match="^rewards must have the dtype of policy, torch.float64, got torch.int64"):
        copg(replace(GROUP, rewards=torch.ones(2, 4, dtype=torch.int64)), beta=0.1)


def test_scores_cannot_be_changed_in_place():
    with pytest.raises(FrozenInstanceError):
        GROUP.rewards = torch.ones(2, 4)  # type: ignore[misc]


@pytest.mark.parametrize("name", LOSSES_OF_SCORES)
def test_hyper_parameters_are_keywords_without_defaults(name):
    assert len(LOSSES_OF_SCORES) == 11
    _, *rest = inspect.signature(vars(losses)[name]).parameters.values()
    assert rest
    for parameter in rest:
        assert parameter.kind is parameter.KEYWORD_ONLY and parameter.default is parameter.empty
