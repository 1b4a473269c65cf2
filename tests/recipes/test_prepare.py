"""Holding out rows where no evaluation set is named."""

import copy
import json

import pytest
from datasets import Dataset

from llmalign.errors import UserError
from llmalign.prepare import hold_out, prepare
from llmalign.recipe import load_recipe


def rows(count: int, prompts: int) -> Dataset:
    return Dataset.from_list([{"row_id": i, "prompt": f"prompt {i % prompts}"} for i in range(count)])


def test_prompts_stay_on_one_side_and_no_row_is_lost() -> None:
    train, held = hold_out(rows(200, 50), 12, seed=0)
    assert not set(train["prompt"]) & set(held["prompt"])
    assert sorted([*train["row_id"], *held["row_id"]]) == list(range(200))
    assert len(held) == 12  # three prompts of four rows each


def test_at_most_a_tenth_is_held_out() -> None:
    train, held = hold_out(rows(30, 30), 500, seed=0)
    assert (len(train), len(held)) == (27, 3)


def test_seed_decides_which() -> None:
    same = [hold_out(rows(100, 100), 10, seed=seed)[1]["row_id"][:] for seed in (0, 0, 1)]
    assert same[0] == same[1] != same[2]


def test_conversations_are_told_apart_by_their_prompt() -> None:
    talk = [{"row_id": i, "prompt": [{"role": "user", "content": str(i // 2)}]} for i in range(40)]
    train, held = hold_out(Dataset.from_list(talk), 4, seed=0)
    assert len(held) == 4 and len(train) == 36


def test_one_prompt_and_streams_cannot_be_split() -> None:
    with pytest.raises(UserError, match="share one prompt"):
        hold_out(rows(20, 1), 2, seed=0)
    with pytest.raises(UserError, match="stream"):
        hold_out(rows(20, 20).to_iterable_dataset(), 2, seed=0)


def test_prompts_are_measured_under_the_chat_template_s_own_arguments(tiny_tokenizer, tmp_path):
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.chat_template = "{% if wordy %}And now, at last: {% endif %}{{ messages[0]['content'] }}"
    rows = [{"prompt": [{"role": "user", "content": "x" * length}]} for length in (1, 12, 2)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = {
        "method": "mdpo", "model_name_or_path": "none", "dataset_name": str(tmp_path / "prompts.jsonl"),
        "reward_funcs": ["none.py:none"], "holdout_rows": 0, "output_dir": str(tmp_path / "run"), "use_cpu": True,
        "num_generations": 4, "per_device_train_batch_size": 8, "max_dropped": 1.0,
    }  # fmt: skip
    kept = {}
    for wordy in (False, True):
        (tmp_path / "recipe.yaml").write_text(
            json.dumps(recipe | {"max_prompt_length": 20, "chat_template_kwargs": {"wordy": wordy}})
        )
        loaded = load_recipe(tmp_path / "recipe.yaml")
        data = prepare(loaded, tokenizer, loaded.training_config(), [tokenizer.eos_token_id])
        kept[wordy] = len(data.train)
    assert kept == {False: 3, True: 2}
