"""Rows of a data set as token ids, made as TRL makes them: pairs, groups of completions, prompts."""

from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from llmalign.data.rows import has_columns
from llmalign.errors import UserError
from llmalign.trainers._trl import AnyDataset, prepare_as_dpo, shared_length, token_ids
from llmalign.trainers.loading import require_chat_template


def _map_options(dataset: AnyDataset, num_proc: int | None, description: str) -> dict[str, Any]:
    """Streams know neither worker processes nor a progress bar."""
    return {"num_proc": num_proc, "desc": description} if isinstance(dataset, Dataset) else {}


def _with_row_ids(dataset: AnyDataset, num_proc: int | None) -> AnyDataset:
    if has_columns(dataset, "row_id"):
        return dataset
    return dataset.map(
        lambda _, index: {"row_id": index}, with_indices=True, **_map_options(dataset, num_proc, "Numbering rows")
    )


def prepare_pairs(
    dataset: AnyDataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int | None,
    num_proc: int | None = None,
    name: str = "train",
) -> AnyDataset:
    """Prepare preference rows as TRL does: implicit prompt split out, EOS added, tokenized; too long prompts dropped.

    Adds `row_id`, `prompt_ids`, `chosen_ids`, `rejected_ids` (lists of ids, untruncated, EOS included) and, where the
    rows have a `base` column, `base_ids`. Rows already prepared come back as they are. Raises UserError for
    conversational rows without a chat template. Not covered: images.
    """
    if has_columns(dataset, "row_id", "prompt_ids", "chosen_ids", "rejected_ids"):
        return dataset
    first = next(iter(dataset))
    require_chat_template(tokenizer, first)
    numbered = _with_row_ids(dataset, num_proc)
    prepared = prepare_as_dpo(numbered, tokenizer, max_length=max_length, num_proc=num_proc, name=name)
    if "base" in first:
        prepared = prepared.map(
            lambda row: {"base_ids": _completion_ids(tokenizer, row["prompt"], row["base"], row["prompt_ids"])},
            **_map_options(prepared, num_proc, f"Tokenizing the base column of {name}"),
        )
    return prepared


def prepare_groups(
    dataset: AnyDataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int | None,
    num_proc: int | None = None,
    name: str = "train",
) -> AnyDataset:
    """Prepare rows of scored completions: adds `row_id`, `prompt_ids` and `completion_ids` (k lists, EOS included).

    Rows whose prompt alone fills `max_length` are dropped, as TRL does for pairs. Rows already prepared come back as
    they are. Raises UserError for conversational rows without a chat template, and naming a row without completions.
    """
    if has_columns(dataset, "row_id", "prompt_ids", "completion_ids"):
        return dataset
    require_chat_template(tokenizer, next(iter(dataset)))

    def tokenize(row: dict[str, Any]) -> dict[str, Any]:
        if not row["completions"]:
            raise UserError(f"Row {row['row_id']} of {name} has no completions, so nothing to score; drop the row.")
        conversational = isinstance(row["prompt"], list)
        options = {"add_generation_prompt": True} if conversational else {}
        prompt_ids = token_ids(tokenizer, row["prompt"], **options)
        full = [_full_ids(tokenizer, row["prompt"], completion) for completion in row["completions"]]
        length = min(shared_length(prompt_ids, ids) for ids in full)
        return {"prompt_ids": prompt_ids[:length], "completion_ids": [ids[length:] for ids in full]}

    numbered = _with_row_ids(dataset, num_proc)
    prepared = numbered.map(tokenize, **_map_options(numbered, num_proc, f"Tokenizing {name}"))
    if max_length is None:
        return prepared
    return prepared.filter(
        lambda row: len(row["prompt_ids"]) < max_length,
        **_map_options(prepared, num_proc, f"Dropping prompts that fill max_length from {name}"),
    )


def prepare_prompts(
    dataset: AnyDataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int | None,
    num_proc: int | None = None,
    name: str = "train",
    chat_template_kwargs: dict[str, Any] | None = None,
) -> AnyDataset:
    """Prepare rows of prompts to sample from: adds `row_id` and `prompt_ids`, and drops longer ones than `max_length`.

    `chat_template_kwargs` are those that the trainer gives the chat template. Rows already prepared come back as they
    are. Raises UserError for conversational rows without a chat template.
    """
    if has_columns(dataset, "row_id", "prompt_ids"):
        return dataset
    require_chat_template(tokenizer, next(iter(dataset)))

    def tokenize(row: dict[str, Any]) -> dict[str, Any]:
        conversational = isinstance(row["prompt"], list)
        options = {"add_generation_prompt": True, **(chat_template_kwargs or {})} if conversational else {}
        return {"prompt_ids": token_ids(tokenizer, row["prompt"], **options)}

    numbered = _with_row_ids(dataset, num_proc)
    prepared = numbered.map(tokenize, **_map_options(numbered, num_proc, f"Tokenizing {name}"))
    if max_length is None:
        return prepared
    return prepared.filter(
        lambda row: len(row["prompt_ids"]) <= max_length,
        **_map_options(prepared, num_proc, f"Dropping prompts longer than {max_length} tokens from {name}"),
    )


def _full_ids(tokenizer: PreTrainedTokenizerBase, prompt: Any, completion: Any) -> list[int]:
    if isinstance(prompt, list):
        return token_ids(tokenizer, prompt + completion)
    end = "" if completion.endswith(tokenizer.eos_token) else tokenizer.eos_token
    return token_ids(tokenizer, prompt + completion + end)


def _completion_ids(
    tokenizer: PreTrainedTokenizerBase, prompt: Any, completion: Any, prompt_ids: list[int]
) -> list[int]:
    full = _full_ids(tokenizer, prompt, completion)
    if full[: len(prompt_ids)] != prompt_ids:
        raise UserError(
            "a base response changes how its prompt is tokenized, so it cannot share the pair's prompt; "
            "end the prompt on a token boundary"
        )
    return full[len(prompt_ids) :]
