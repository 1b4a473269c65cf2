"""Batches: the sequences of TRL's on the same pairs, and worked out by hand."""

import random

import pytest
import torch
from trl.trainer.dpo_trainer import DataCollatorForPreference

from llmalign.data.collators import GroupCollator, PairCollator, PromptCollator
from llmalign.errors import UserError


def random_pairs(count: int, seed: int) -> list[dict]:
    rng = random.Random(seed)

    def ids(low: int, high: int) -> list[int]:
        return [rng.randrange(5, 99) for _ in range(rng.randint(low, high))]

    return [
        {
            "row_id": 100 + index,
            "prompt_ids": ids(1, 9),
            "chosen_ids": ids(0, 12),
            "rejected_ids": ids(1, 12),
            "ref_chosen_logps": -rng.random() * 50,
            "ref_rejected_logps": -rng.random() * 50,
        }
        for index in range(count)
    ]


@pytest.mark.parametrize("max_length", [None, 10, 14, 64])
@pytest.mark.parametrize("count", [1, 7])
def test_pairs_are_the_sequences_of_trl_s(max_length, count):
    examples = random_pairs(count, seed=count)
    ours = PairCollator(max_length=max_length)(examples)
    theirs = DataCollatorForPreference(pad_token_id=3, max_length=max_length)(examples)
    assert next(iter(ours)) == "row_id" and ours["row_id"].tolist() == [example["row_id"] for example in examples]
    for side in (0, 1):  # TRL lays all chosen out first, then all rejected
        for row in range(count):
            ids, shown, scored = (
                theirs[key][side * count + row] for key in ("input_ids", "attention_mask", "completion_mask")
            )
            prompt, completion = ours["groups"].prompts[row], ours["groups"].completions[row][side]
            assert prompt + completion == ids[shown.bool()].tolist() and completion == ids[scored.bool()].tolist()
    for key in ("ref_chosen_logps", "ref_rejected_logps"):
        torch.testing.assert_close(ours[key], theirs[key], rtol=0, atol=0)


def test_pairs_by_hand_with_every_extra():
    examples = [
        {"row_id": 4, "prompt_ids": [1, 2], "chosen_ids": [3, 9], "rejected_ids": [9], "base_ids": [5, 6, 9],
         "flipped": True, "last_chosen_logps": -1.5, "last_rejected_logps": -2.0},
        {"row_id": 2, "prompt_ids": [7], "chosen_ids": [8, 8, 8, 9], "rejected_ids": [4, 9], "base_ids": [9],
         "flipped": False, "last_chosen_logps": -3.0, "last_rejected_logps": -4.0},
    ]  # fmt: skip
    batch = PairCollator(max_length=4)(examples)
    assert batch["row_id"].tolist() == [4, 2]
    assert batch["groups"].prompts == [[1, 2], [7]]
    assert batch["groups"].completions == [[[3, 9], [9], [5, 6]], [[8, 8, 8], [4, 9], [9]]]
    assert batch["groups"].unique_tokens() == [7, 7] and batch["groups"].lengths() == [2, 1, 2, 3, 2, 1]
    assert batch["groups"].first(2).take([1]).sequences() == [([7], [8, 8, 8]), ([7], [4, 9])]
    assert batch["flipped"].tolist() == [True, False] and batch["flipped"].dtype == torch.bool
    assert batch["last_chosen_logps"].tolist() == [-1.5, -3.0] and batch["last_rejected_logps"].tolist() == [-2.0, -4.0]


def test_groups_by_hand():
    examples = [
        {"row_id": 7, "prompt_ids": [1], "completion_ids": [[2, 9], [3, 4, 9]], "rewards": [0.5, -1.0],
         "ref_logps": [-1.0, -2.0]},
        {"row_id": 8, "prompt_ids": [5, 6], "completion_ids": [[9], [2, 9], [7, 7, 9]], "rewards": [1.0, 2.0, 3.0],
         "ref_logps": [-3.0, -4.0, -5.0]},
    ]  # fmt: skip
    batch = GroupCollator(max_length=4)(examples)
    assert list(batch)[0] == "row_id" and batch["row_id"].tolist() == [7, 8]
    assert batch["groups"].completions == [[[2, 9], [3, 4, 9]], [[9], [2, 9], [7, 7]]]
    assert batch["rewards"].tolist() == [[0.5, -1.0, 0.0], [1.0, 2.0, 3.0]]
    assert batch["group_mask"].tolist() == [[True, True, False], [True, True, True]]
    assert batch["ref_logps"].tolist() == [[-1.0, -2.0, 0.0], [-3.0, -4.0, -5.0]]
    scores = torch.full(batch["group_mask"].shape, -1.0)
    scores[batch["group_mask"]] = torch.arange(5.0)  # the order of the sequences is the mask's own
    assert scores.tolist() == [[0.0, 1.0, -1.0], [2.0, 3.0, 4.0]]


def test_a_prompt_that_fills_max_length_names_its_row():
    row = {"row_id": 31, "prompt_ids": [1, 2, 3], "chosen_ids": [4], "rejected_ids": [5]}
    with pytest.raises(UserError, match="Row 31: the prompt alone has 3 tokens and fills max_length 3"):
        PairCollator(max_length=3)([row])
    with pytest.raises(UserError, match="Row 31 has an empty prompt"):
        PairCollator()([row | {"prompt_ids": []}])
    with pytest.raises(UserError, match="Row 5 has 1 completions and 2 rewards"):
        row = {"row_id": 5, "prompt_ids": [1], "completion_ids": [[2]], "rewards": [1.0, 2.0]}
        GroupCollator()([row])


def test_prompts_are_padded_on_the_left_and_keep_their_end():
    examples = [{"row_id": 1, "prompt_ids": [1, 2, 3, 4]}, {"row_id": 2, "prompt_ids": [5]}]
    batch = PromptCollator(pad_token_id=0, max_length=3)(examples)
    assert batch["input_ids"].tolist() == [[2, 3, 4], [0, 0, 5]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [0, 0, 1]]
    wide = PromptCollator(pad_token_id=0, pad_to_multiple_of=8)(examples)
    assert wide["input_ids"].tolist() == [[0, 0, 0, 0, 1, 2, 3, 4], [0] * 7 + [5]] and wide["row_id"].tolist() == [1, 2]
