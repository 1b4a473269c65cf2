"""One prepared row, token by token, with what is learned, what is only read and what is cut off."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.text import Text

PROMPT, LEARNED, END, CUT = "dim", "green", "bold white on dark_green", "red strike"
WORD_START = "▁"  # how SentencePiece writes a space
VISIBLE = {"\n": "⏎", "\t": "⇥", " ": "␣", WORD_START: "␣"}


def show_row(
    row: Mapping[str, Any], tokenizer: Any, console: Console, max_length: int | None = None,
    eos_ids: Sequence[int] | None = None,
) -> None:  # fmt: skip
    """Print a prepared row of pairs, groups or text, tokens separated by a bar, each part with its mask and its length.

    Prompt tokens (mask 0) are dim, completion tokens (mask 1) coloured, end-of-text tokens inverted, and tokens beyond
    `max_length`, which training never sees, struck out. `eos_ids` defaults to the tokenizer's own.
    """
    ends = {tokenizer.eos_token_id} if eos_ids is None else set(eos_ids)
    console.print(f"row {row['row_id']}", style="bold")
    if "input_ids" in row:
        learned = _learned_text(row)
        _print_part(console, tokenizer, "text", row["input_ids"], learned, 0, max_length, ends)
        return
    prompt = row["prompt_ids"]
    _print_part(console, tokenizer, "prompt", prompt, [False] * len(prompt), 0, max_length, ends)
    for name, ids in _completions(row):
        _print_part(console, tokenizer, name, ids, [True] * len(ids), len(prompt), max_length, ends)


def _completions(row: Mapping[str, Any]) -> list[tuple[str, list[int]]]:
    if "completion_ids" in row:
        rewards = row["rewards"]
        return [(f"completion {i}, reward {rewards[i]:g}", ids) for i, ids in enumerate(row["completion_ids"])]
    return [(side, row[f"{side}_ids"]) for side in ("chosen", "rejected")]


def _learned_text(row: Mapping[str, Any]) -> list[bool]:
    if "labels" in row:
        return [label != -100 for label in row["labels"]]
    if "completion_mask" in row:
        return [bool(mask) for mask in row["completion_mask"]]
    return [True] * len(row["input_ids"])


def _print_part(
    console: Console, tokenizer: Any, name: str, ids: Sequence[int], learned: Sequence[bool], start: int,
    max_length: int | None, ends: set[int],
) -> None:  # fmt: skip
    room = len(ids) if max_length is None else max(0, min(len(ids), max_length - start))
    masks = f"{sum(learned[:room])} with mask 1, {room - sum(learned[:room])} with mask 0"
    cut = f", {len(ids) - room} cut off at max_length {max_length}" if room < len(ids) else ""
    line = Text(f"{name}: {len(ids)} tokens, {masks}{cut}\n", style="bold")
    for index, token in enumerate(ids):
        style = CUT if index >= room else END if token in ends else LEARNED if learned[index] else PROMPT
        if index == room:
            line.append("✂", style="not bold red")
        line.append(_token(tokenizer, token), style=f"not bold {style}" if style is not END else style)
        line.append("|", style="not bold dim")
    console.print(line, soft_wrap=True)


def _token(tokenizer: Any, token: int) -> str:
    """The token's text with its white space visible, or its raw form where it is only part of a character."""
    text, raw = tokenizer.decode([token]), tokenizer.convert_ids_to_tokens(token)
    if "\ufffd" in text or not text:
        text = raw
    elif raw.startswith(WORD_START) and not text.startswith(" "):
        text = f" {text}"  # decoding one token alone drops the space that it begins with
    return "".join(VISIBLE.get(character, character) for character in text)
