"""The rows of a micro-batch in words: their numbers in the data, their texts, and every number that came with them."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor

from llmalign.trainers.pair import FILLER
from llmalign.types import PromptGroups

SHOWN_ROWS = 8
PROMPT, CHOSEN, REJECTED, BASE, CAPTION = "prompt", "chosen", "rejected", "base", "caption"
_TOLD = frozenset({FILLER, "row_id", "groups", "prompt_ids", "prompt_mask", "completion_ids", "completion_mask"})
_TOKENS = ("input_ids", "attention_mask", "labels", "completion_mask", "position_ids", "seq_idx")


def rows_of(
    inputs: Mapping[str, Any], tokenizer: Any, dataset: Any, args: Any, captions: list[str] | None = None
) -> list[dict[str, Any]]:
    """`row` (its row_id, else its place in the data set, None where it is unknown) and content of each row.

    Understood are pairs and groups (`groups`), rollouts (`completion_ids` (P, K, T)), and TRL's batches of token ids.
    Of images the caller gives the captions. Rows that only fill a batch are left out.
    """
    texts: list[dict[str, Any]]
    if captions is not None:
        texts = [{CAPTION: caption} for caption in captions]
    elif "groups" in inputs:
        sides = () if "rewards" in inputs else (CHOSEN, REJECTED, BASE)
        groups = inputs["groups"]
        texts = [_pair_or_group(groups, place, tokenizer, sides) for place in range(len(groups))]
    elif "completion_ids" in inputs:
        texts = _rollout(inputs, tokenizer)
    elif "input_ids" in inputs:
        texts = _token_batch(inputs, tokenizer, dataset, args)
    else:
        raise TypeError(f"a batch of {', '.join(inputs)} has no rows that can be told")
    numbers = inputs["row_id"].tolist() if "row_id" in inputs else [row.pop("row", None) for row in texts]
    used = _TOLD if "input_ids" not in inputs else _TOLD | set(_TOKENS)
    fills = inputs[FILLER].tolist() if FILLER in inputs else [False] * len(texts)
    return [
        {"row": number if number != -1 else None} | text | _values(inputs, place, len(texts), used)
        for place, (number, text, fill) in enumerate(zip(numbers, texts, fills, strict=True))
        if not fill
    ]


def named(rows: Iterable[Mapping[str, Any]]) -> str:
    """The numbers of rows as a sentence has them."""
    numbers = list(dict.fromkeys(row["row"] for row in rows if row["row"] is not None))
    if not numbers:
        return "rows without numbers"
    shown = ", ".join(map(str, numbers[:SHOWN_ROWS]))
    more = f" and {len(numbers) - SHOWN_ROWS} more" if len(numbers) > SHOWN_ROWS else ""
    return f"row{'s' if len(numbers) > 1 else ''} {shown}{more}"


def plain(value: Any) -> Any:
    """Numbers and lists of them as JSON has them, which knows no NaN: those that are not finite become words."""
    if isinstance(value, list):
        return [plain(one) for one in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _values(inputs: Mapping[str, Any], place: int, rows: int, used: Iterable[str]) -> dict[str, Any]:
    """The row's numbers, or of larger tensors whether they are finite."""
    told: dict[str, Any] = {}
    faulty = []
    for name, tensor in inputs.items():
        if name in used or not isinstance(tensor, Tensor) or tensor.ndim == 0 or len(tensor) != rows:
            continue
        own = tensor[place].detach()
        if own.is_floating_point() and not bool(own.isfinite().all()):
            faulty.append(name)
        if own.ndim < 2:
            told[name] = plain(own.tolist())
    return told | {"inputs_not_finite": faulty}


def _pair_or_group(groups: PromptGroups, place: int, tokenizer: Any, sides: tuple[str, ...]) -> dict[str, Any]:
    completions = [tokenizer.decode(ids) for ids in groups.completions[place]]
    told = dict(zip(sides, completions, strict=False)) if sides else {"completions": completions}
    return {PROMPT: tokenizer.decode(groups.prompts[place])} | told


def _rollout(inputs: Mapping[str, Any], tokenizer: Any) -> list[dict[str, Any]]:
    return [
        {
            PROMPT: tokenizer.decode(prompt[there.bool()]),
            "completions": [tokenizer.decode(ids[mask.bool()]) for ids, mask in zip(completions, masks, strict=True)],
        }
        for prompt, there, completions, masks in zip(
            *(inputs[name] for name in ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask")), strict=True
        )
    ]


def _token_batch(inputs: Mapping[str, Any], tokenizer: Any, dataset: Any, args: Any) -> list[dict[str, Any]]:
    """TRL's batches: texts, or chosen ones followed by rejected ones; found again in the data by their token ids."""
    sequences = _sequences(inputs)
    columns = dataset.column_names if isinstance(dataset, Dataset) else []
    of_pairs = "chosen_ids" in (columns or [])
    count = len(sequences) // 2 if of_pairs else len(sequences)
    keys = [tuple(ids) for ids in sequences[:count]]
    found = _places(dataset, keys, args) if columns else {}
    rows = []
    for place in range(count):
        if of_pairs:
            sides = {CHOSEN: sequences[place], REJECTED: sequences[count + place]}
            row: dict[str, Any] = {side: tokenizer.decode(ids) for side, ids in sides.items()}
        else:
            row = {"text": tokenizer.decode(sequences[place])}
        rows.append({"row": found.get(keys[place])} | row)
    return rows


def _sequences(inputs: Mapping[str, Any]) -> list[list[int]]:
    """Token ids of the sequences of a batch, without padding."""
    ids = inputs["input_ids"]
    if "attention_mask" in inputs:
        masks = inputs["attention_mask"].bool()
        return [own[mask].tolist() for own, mask in zip(ids, masks, strict=True)]
    starts = (inputs["position_ids"][0] == 0).nonzero().flatten().tolist()  # one row without padding
    return [part.tolist() for part in torch.tensor_split(ids[0].cpu(), starts[1:])]


def _places(dataset: Dataset, keys: list[tuple[int, ...]], args: Any) -> dict[tuple[int, ...], int]:
    """The first row with each sequence of token ids, which a batch may have cut to `max_length`."""
    columns = [name for name in ("input_ids", "prompt_ids", "chosen_ids") if name in dataset.column_names]
    wanted = set(keys)
    found: dict[tuple[int, ...], int] = {}
    numbered = "row_id" in dataset.column_names
    kept = dataset.select_columns([*columns, *(["row_id"] if numbered else [])])
    for place, row in enumerate(kept):
        whole = tuple(token for name in columns for token in row[name])
        key = whole if whole in wanted else whole[: args.max_length]
        if key in wanted:
            found.setdefault(key, row["row_id"] if numbered else place)
    return found
