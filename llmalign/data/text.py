"""Rows for supervised fine-tuning as token ids, so that the doctor can look at them before the trainer does."""

from typing import Any

from datasets import Dataset, IterableDataset


def tokenize_text(
    raw: Dataset | IterableDataset, tokenizer: Any, *, num_proc: int | None = None, name: str = "train"
) -> Dataset | IterableDataset:
    """Rows of kind `text` with `input_ids`, untruncated, and `completion_mask` (1 where a completion is).

    End-of-text is put after plain text that lacks it; conversations end as the chat template ends them. Without a
    prompt every token counts as completion. These ids are for `examine` and `drop_overlong`: the SFT trainer tokenizes
    the raw rows itself, in the same way. Not covered: packing, and learning the assistant's turns alone.
    """
    options = {"num_proc": num_proc, "desc": f"Tokenizing {name}"} if isinstance(raw, Dataset) else {}
    return raw.map(_tokenize_row, fn_kwargs={"tokenizer": tokenizer}, **options)


def _tokenize_row(row: dict[str, Any], tokenizer: Any) -> dict[str, Any]:
    if "completion" not in row:
        ids = _ids(tokenizer, row["messages"] if "messages" in row else _ended(row["text"], tokenizer))
        return {"input_ids": ids, "completion_mask": [1] * len(ids)}
    prompt, completion = row["prompt"], row["completion"]
    before = _ids(tokenizer, prompt, add_generation_prompt=True)
    ids = _ids(tokenizer, prompt + (completion if isinstance(completion, list) else _ended(completion, tokenizer)))
    shared = next((i for i, (a, b) in enumerate(zip(before, ids, strict=False)) if a != b), min(len(before), len(ids)))
    return {"input_ids": ids, "completion_mask": [0] * shared + [1] * (len(ids) - shared)}


def _ids(tokenizer: Any, content: Any, add_generation_prompt: bool = False) -> list[int]:
    if isinstance(content, str):
        return tokenizer(content)["input_ids"]
    options = {"tokenize": True, "return_dict": True, "add_generation_prompt": add_generation_prompt}
    return tokenizer.apply_chat_template(content, **options)["input_ids"]


def _ended(text: str, tokenizer: Any) -> str:
    return text if text.endswith(tokenizer.eos_token) else text + tokenizer.eos_token
