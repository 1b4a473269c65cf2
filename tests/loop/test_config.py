"""The keys of the rounds: their defaults are the paper's, and whatever is refused is named."""

import math
from dataclasses import fields
from typing import Any

import pytest

from llmalign.errors import UserError
from llmalign.loop.config import HARMLESS, LoopConfig
from llmalign.trainers import METHODS
from llmalign.trainers.loading import ModelConfig
from tests.loop.running import Bench

FUNCTION = {"oracle": "preference_function", "preference_function": "mine.py:f"}
MODEL = {"oracle": "preference_model", "preference_model": "folder"}
JUDGE = {"oracle": "judge", "judge_url": "http://127.0.0.1:1/v1", "judge_model": "m"}
REWARD = {"oracle": "reward", "reward_funcs": ["mine.py:f"]}


def test_the_defaults_are_those_of_the_paper() -> None:
    """Three rounds, eight samples, a tournament, temperature one and no cut of the distribution."""
    loop = LoopConfig(**FUNCTION)
    assert (loop.rounds, loop.samples_per_prompt, loop.select, loop.labels) == (3, 8, "best_worst", "likelier")
    assert (loop.temperature, loop.top_p, loop.reuse_prompts, loop.truncated) == (1.0, 1.0, False, "keep")


@pytest.mark.parametrize("keys", [FUNCTION, MODEL, JUDGE, REWARD, {"oracle": "reward", "reward_models": ["folder"]}])
def test_every_oracle_has_what_it_needs(keys: dict[str, Any]) -> None:
    assert LoopConfig(**keys).oracle == keys["oracle"]


@pytest.mark.parametrize(
    ("keys", "sentence"),
    [
        ({"rounds": 0}, "rounds must be at least 1, got 0"),
        ({"eval_samples": 0}, "eval_samples must be at least 1, got 0"),
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1"),
        ({"sampling_batch_size": 0}, "sampling_batch_size must be at least 1"),
        ({"shard_prompts": -1}, "shard_prompts must be at least 1, got -1"),
        ({"prompts_per_round": 0}, "prompts_per_round must be at least 1, got 0"),
        ({"eval_prompts": -1}, "eval_prompts must be zero or more, got -1"),
        ({"keep_rounds": 0}, "keep_rounds must be at least 1, or left open, got 0"),
        ({"samples_per_prompt": 1}, "samples_per_prompt must be at least 2 to compare answers, got 1"),
        ({"temperature": 0}, "temperature must be a positive number, got 0"),
        ({"temperature": -1.0}, "temperature must be a positive number"),
        ({"temperature": math.nan}, "temperature must be a positive number, got nan"),
        ({"temperature": math.inf}, "temperature must be a positive number, got inf"),
        ({"top_p": 0.0}, "top_p must be in (0, 1], got 0.0"),
        ({"top_p": 1.1}, "top_p must be in (0, 1], got 1.1"),
        ({"top_p": math.nan}, "top_p must be in (0, 1], got nan"),
        ({**REWARD, "margin": -0.1}, "margin must be zero or a positive number, got -0.1"),
        ({**REWARD, "margin": math.nan}, "margin must be zero or a positive number, got nan"),
        ({"select": "best"}, "select must be one of best_worst, best_random, all_pairs, independent, got 'best'"),
        ({"labels": "drawn"}, "labels must be one of likelier, sampled, got 'drawn'"),
        ({"truncated": "cut"}, "truncated must be one of keep, drop, got 'cut'"),
        ({"reference": "last"}, "reference must be one of start, previous, got 'last'"),
        ({**JUDGE, "judge_answers": "words"}, "judge_answers must be one of logprobs, text, got 'words'"),
        ({**JUDGE, "judge_letters": ["A"]}, "judge_letters must be two letters, such as [A, B], got ['A']"),
        ({**JUDGE, "judge_concurrency": 0}, "judge_concurrency must be at least 1, got 0"),
        ({**JUDGE, "judge_timeout": 0.0}, "judge_timeout must be a positive number, got 0.0"),
        ({**JUDGE, "judge_patience": -1.0}, "judge_patience must be zero or a positive number, got -1.0"),
        ({**JUDGE, "judge_max_requests": -1}, "judge_max_requests must be"),
        ({**JUDGE, "judge_max_tokens": -1}, "judge_max_tokens must be"),
        ({**JUDGE, "judge_top_logprobs": 1}, "judge_top_logprobs must be at least 2, got 1"),
        ({"vllm_timeout": 0.0}, "vllm_timeout must be a positive number, got 0.0"),
        ({"oracle": None}, "the recipe names no oracle: set oracle to one of preference_function, preference_model"),
        ({"oracle": "rewards"}, "oracle must be one of preference_function, preference_model, judge, reward, got"),
        ({"preference_function": None}, "oracle: preference_function needs preference_function"),
        ({**MODEL, "preference_model": None}, "oracle: preference_model needs preference_model"),
        ({**JUDGE, "judge_url": None}, "oracle: judge needs judge_url"),
        ({**JUDGE, "judge_model": None}, "oracle: judge needs judge_model"),
        ({**REWARD, "reward_funcs": None}, "oracle: reward needs reward_funcs or reward_models"),
        ({**REWARD, "reward_funcs": []}, "oracle: reward needs reward_funcs or reward_models"),
        ({**MODEL, "preference_function": "f"}, "preference_function belongs to oracle: preference_function, and this"),
        ({"preference_model": "m"}, "preference_model belongs to oracle: preference_model, and this run's is"),
        ({"reward_funcs": ["f"]}, "reward_funcs belongs to oracle: reward, and this run's is preference_function"),
        ({"reward_models": ["m"]}, "reward_models belongs to oracle: reward"),
        ({"margin": 0.5}, "margin belongs to oracle: reward"),
        ({**MODEL, "oracle_columns": ["tag"]}, "oracle_columns belongs to oracle: preference_function or reward"),
        ({**MODEL, "both_orders": True}, "both_orders belongs to oracle: preference_function or judge"),
        ({"judge_url": "http://x"}, "judge_url belongs to oracle: judge, and this run's is preference_function"),
        ({"judge_concurrency": 2}, "judge_concurrency belongs to oracle: judge"),
        ({"judge_api_key_env": "KEY"}, "judge_api_key_env belongs to oracle: judge"),
        ({**REWARD, "labels": "sampled"}, "labels: sampled needs an oracle that gives probabilities"),
    ],
)  # fmt: skip
def test_what_is_refused_is_named(keys: dict[str, Any], sentence: str) -> None:
    keys = keys if "oracle" in keys else {**FUNCTION, **keys}
    with pytest.raises(UserError) as refused:
        LoopConfig(**keys)
    assert str(refused.value).startswith(sentence)


def test_every_judge_s_key_is_refused_for_another_oracle() -> None:
    for entry in fields(LoopConfig):
        if entry.name.startswith("judge_"):
            other = {"judge_answers": "text", "judge_letters": ["a", "b"]}.get(entry.name, 7)
            with pytest.raises(UserError, match=f"^{entry.name} belongs to oracle: judge"):
                LoopConfig(**FUNCTION, **{entry.name: other})


def test_what_may_change_is_a_key_and_every_key_is_explained() -> None:
    known = {entry.name: entry.metadata.get("help") for entry in fields(LoopConfig)}
    assert set(known) >= HARMLESS and all(known.values())


@pytest.mark.parametrize(
    ("keys", "sentence"),
    [
        ({"method": "dpo", "eta": None}, "not by method: dpo; use method: pair with loss: dpo"),
        ({"method": "sft", "eta": None}, "not by method: sft; use inpo, pair (any pairwise loss), rpo, rdpo or copg"),
        ({"method": "mdpo", "eta": None, "max_length": None}, "not by method: mdpo"),
        ({"method": "reward", "eta": None}, "not by method: reward"),
        ({"method": "copg", "eta": None}, "method: copg trains on rewards: set oracle: reward"),
        ({"last_model_name_or_path": "m"}, "last_model_name_or_path is set by iterate itself"),
        ({"last_adapter": "m"}, "last_adapter is set by iterate itself"),
        ({"method": "rpo", "base": "reference"}, "base: chosen is the one that iterate has rows for"),
        (
            {"method": "rdpo", "eta": None, "flip_rate": "estimate", "scorer_margin_column": "s"},
            "flip_rate: estimate needs an independent scorer's margins",
        ),
        ({"model_revision": "main"}, "model_revision is not read by iterate"),
        ({"streaming": True, "max_steps": 4}, "streaming: true has no end to part into rounds"),
        ({"dataset_test_split": "test"}, "dataset_test_split is not read by iterate"),
        ({"eval_datasets": {"test": "x.jsonl"}}, "eval_datasets is not read by iterate"),
        ({"max_length": 6}, "max_length 6 leaves a prompt no room beside max_new_tokens 6"),
        ({"reference": "previous"}, "reference: previous is INPO without its reference: set tau: 0 instead"),
        ({"prompts_per_round": 5}, "2 rounds of 5 fresh prompts need more than the 9 that are left after eval_prompts"),
        ({"eval_prompts": 12}, "there are 12 prompts that fit and eval_prompts takes 12 of them"),
        ({"max_length": 15}, "there are 0 prompts that fit and eval_prompts takes 3 of them"),
        ({"temperature": 0}, "temperature must be a positive number"),
        ({"samples": 3}, "unknown key `samples`; the nearest is"),
        ({"oracle": None, "preference_function": None}, "the recipe names no oracle"),
        (
            {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 2, "save_steps": 2},
            "load_best_model_at_end",
        ),
    ],
)
def test_what_no_round_can_be_made_of_is_refused_before_anything_is_written(
    keys: dict[str, Any], sentence: str, bench: Bench, capsys: pytest.CaptureFixture[str]
) -> None:
    bench.write(**keys)
    assert bench.iterate() == 2
    said = capsys.readouterr().err
    assert sentence in said and said.count("llmalign: ") == 1 and "Traceback" not in said
    assert not bench.output.exists()


def test_a_value_from_the_command_line_is_blamed_on_it(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.iterate("--temperature", "0") == 2
    assert "llmalign: the command line: temperature must be a positive number, got 0" in capsys.readouterr().err


@pytest.mark.parametrize("method", ["inpo", "pair", "rpo", "rdpo", "copg"])
def test_no_key_has_two_owners(method: str) -> None:
    keys = {entry.name for entry in fields(LoopConfig)}
    assert not keys & {entry.name for owner in (METHODS[method].config, ModelConfig) for entry in fields(owner)}
