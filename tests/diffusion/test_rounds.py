"""The rows of rounds: which captions, pairs and steps come when; and rounds in checkpoints."""

from collections import Counter

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file

from llmalign.diffusion.rounds import FILE, Round, RoundRows

IDS = [3, 1, 4, 7, 5]


def rows(captions: list[int] = IDS, **changes: int) -> RoundRows:
    given = {"rounds": 4, "pairs": 3, "steps": [0, 1, 2, 5], "kept_steps": 4, "inner_epochs": 1, "seed": 0, **changes}
    return RoundRows(Dataset.from_dict({"caption_id": captions}), **given)


def cells(made: RoundRows, number: int) -> list[tuple[int, int]]:
    start = number * made.per_round
    found = [made[place] for place in range(start, start + made.per_round)]
    assert {row["round"] for row in found} == {number}
    return [(row["pair"], row["step"]) for row in found]


def test_a_round_is_every_step_of_every_pair_once_in_an_order_of_its_own():
    made = rows()
    assert made.per_round == 12 and len(made) == 48
    every = [(pair, step) for pair in range(3) for step in (0, 1, 2, 5)]
    orders = [cells(made, number) for number in range(4)]
    for order in orders:
        assert sorted(order) == every and order != every
    assert orders[0] != orders[1]
    for place in range(48):
        row = made[place]
        assert row["row_id"] == 3 * row["round"] + row["pair"]
        assert row["caption_id"] == made.caption_ids(row["round"])[row["pair"]]


def test_inner_epochs_are_passes_over_a_round():
    made = rows(inner_epochs=2)
    assert made.per_round == 24 and len(made) == 96
    order = cells(made, 1)
    assert Counter(order[:12]) == Counter(order[12:]) == Counter(set(order)) and order[:12] != order[12:]


def test_a_share_of_the_steps_is_drawn_for_each_pair_anew():
    made = rows(kept_steps=2, pairs=40, inner_epochs=2)
    assert made.per_round == 160
    order = cells(made, 0)
    chosen = [
        {pair: frozenset(step for p, step in part if p == pair) for pair in range(40)}
        for part in (order[:80], order[80:])
    ]
    assert all(len(steps) == 2 for part in chosen for steps in part.values())
    assert len(set(chosen[0].values())) == 6, "all pairs of four steps turn up"
    assert 20 < sum(chosen[0][pair] != chosen[1][pair] for pair in range(40))
    assert all(12 < count < 28 for count in Counter(step for _, step in order[:80]).values())


def test_captions_come_in_passes_over_all_of_them():
    made = rows(rounds=5)
    order = [caption for number in range(5) for caption in made.caption_ids(number)]
    passes = [order[start : start + 5] for start in (0, 5, 10)]
    assert all(sorted(some) == sorted(IDS) for some in passes)
    assert passes[0] != passes[1] and len(set(map(tuple, passes))) > 1
    few = rows(captions=[2, 9], pairs=7)
    assert Counter(few.caption_ids(0)) in (Counter({2: 4, 9: 3}), Counter({2: 3, 9: 4}))
    assert Counter(few.caption_ids(0) + few.caption_ids(1)) == Counter({2: 7, 9: 7})


def test_rows_are_functions_of_place_and_seed():
    made, again = rows(), rows()
    backwards = [again[place] for place in reversed(range(48))][::-1]
    torch.manual_seed(5)
    assert [made[place] for place in range(48)] == backwards
    other = rows(seed=1)
    assert cells(other, 0) != cells(made, 0)
    assert [other.caption_ids(number) for number in range(4)] != [made.caption_ids(number) for number in range(4)]


def a_round() -> Round:
    generator = torch.Generator().manual_seed(0)
    log_probs = torch.randn(3, 2, 2, generator=generator)
    log_probs[-1] = torch.nan
    return Round(
        7,
        torch.randn(4, 2, 2, 4, 2, 2, generator=generator).transpose(4, 5),
        log_probs,
        torch.tensor([1, -1]),
        torch.tensor([[[0.5], [torch.nan]], [[1.0], [2.0]]]),
    )


def test_a_round_comes_back_from_a_checkpoint_bit_by_bit(tmp_path):
    drawn = a_round()
    drawn.save(tmp_path)
    found = Round.load(tmp_path)
    assert found is not None and found.number == 7
    for name in ("latents", "log_probs", "preference", "rewards"):
        one, other = vars(drawn)[name], vars(found)[name]
        assert one.dtype == other.dtype and one.shape == other.shape
        assert torch.equal(one.nan_to_num(9.0), other.nan_to_num(9.0)) and torch.equal(one.isnan(), other.isnan())
    assert load_file(tmp_path / FILE).keys() == vars(drawn).keys() - {"number"}


def test_a_checkpoint_without_a_round_has_none(tmp_path):
    assert Round.load(tmp_path) is None


@pytest.mark.parametrize("pairs, kept", [(3, 1), (1, 4)])
def test_the_smallest_rounds(pairs, kept):
    made = rows(pairs=pairs, kept_steps=kept, rounds=1)
    assert len(cells(made, 0)) == pairs * kept == len(made)
