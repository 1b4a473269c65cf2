"""Prompts and sentences of the embedded world, written and read back from text."""

import random
import re
from dataclasses import dataclass
from functools import cache

from llmalign.embedded import words
from llmalign.errors import UserError

HELD_OUT_SHARE = 0.15


@dataclass(frozen=True)
class Prompt:
    """One task: a family of tasks, its item, its modifier (reader, addressee or mood) and one of three wordings."""

    family: str
    item: str
    modifier: str
    wording: int

    @property
    def text(self) -> str:
        """The instruction, ended by a line break: the answer starts on a line of its own."""
        frame = words.FAMILIES[self.family].wordings[self.wording]
        return frame.format(i=self.item, m=self.modifier) + "\n"


@dataclass(frozen=True)
class Sentence:
    """What one sentence of an answer says.

    `kind` is `main`, `detail`, `courteous`, `plain`, `rude` or `dodge`. A main sentence has an item and a modifier
    (None when it names no modifier), and the item that its reason is true of (None when it gives no reason).
    """

    kind: str
    item: str | None = None
    modifier: str | None = None
    reason_for: str | None = None


@cache
def prompts() -> tuple[Prompt, ...]:
    """All 1,440 prompts of the world, in a fixed order."""
    return tuple(
        Prompt(name, item.name, modifier, wording)
        for name, family in words.FAMILIES.items()
        for item in family.items
        for modifier in family.modifiers
        for wording in range(len(family.wordings))
    )


@cache
def split(seed: int = 0) -> tuple[tuple[Prompt, ...], tuple[Prompt, ...]]:
    """Train and held-out prompts; a held-out (item, modifier) combination is seen in training under no wording."""
    combinations = sorted({(prompt.item, prompt.modifier) for prompt in prompts()})
    random.Random(seed).shuffle(combinations)
    held_out = set(combinations[: round(HELD_OUT_SHARE * len(combinations))])
    train = tuple(prompt for prompt in prompts() if (prompt.item, prompt.modifier) not in held_out)
    return train, tuple(prompt for prompt in prompts() if (prompt.item, prompt.modifier) in held_out)


@cache
def _prompts_by_text() -> dict[str, Prompt]:
    return {prompt.text.strip(): prompt for prompt in prompts()}


def parse_prompt(text: str) -> Prompt:
    """The prompt that a text states; white space around it does not matter.

    Raises UserError for a text that is no prompt of this world.
    """
    found = _prompts_by_text().get(text.strip())
    if found is None:
        raise UserError(
            f"{text.strip()[:80]!r} is not a prompt of the embedded world, so its ground truth cannot judge it."
        )
    return found


def as_sentence(phrase: str) -> str:
    """A phrase of `words` as a written sentence: capital first, full stop last."""
    return phrase[0].upper() + phrase[1:] + "."


def split_sentences(text: str) -> list[str]:
    """The sentences of an answer; what follows the last full stop counts as one too."""
    return [part.strip() for part in re.findall(r"[^.]*\.|[^.]+$", text) if part.strip()]


def read_sentence(text: str) -> Sentence | None:
    """What a written sentence says, or None where the grammar rejects it: it is broken."""
    if not text.endswith(".") or text[0] != text[0].upper():
        return None
    body = text[:-1]
    found = _simple_sentences().get(_key(body))
    if found is not None:
        return found
    for match in _REASON_START.finditer(body):
        main = _simple_sentences().get(_key(body[: match.start()]))
        reason_for = _reasons().get(_key(body[match.end() :]))
        if main is not None and main.kind == "main" and reason_for is not None:
            return Sentence("main", main.item, main.modifier, reason_for)
    return None


_REASON_START = re.compile("|".join(f" {frame.removesuffix('{r}')}" for frame in words.REASON_FRAMES))


def _key(phrase: str) -> str:
    """Phrases are looked up with the first letter in lower case, because a sentence starts with a capital."""
    return phrase[:1].lower() + phrase[1:]


@cache
def _reasons() -> dict[str, str]:
    return {_key(why): item.name for family in words.FAMILIES.values() for item in family.items for why in item.reasons}


@cache
def _simple_sentences() -> dict[str, Sentence]:
    """Every sentence without a reason, keyed by its phrase."""
    table = {_key(phrase): Sentence("dodge") for phrase in words.DODGES}
    for phrases in (words.OPENINGS, words.CLOSINGS):
        table |= {_key(phrase): Sentence(kind) for kind, group in phrases.items() for phrase in group}
    for family in words.FAMILIES.values():
        for item in family.items:
            name = item.name
            table |= {
                _key(frame.format(d=detail)): Sentence("detail", name)
                for frame in words.DETAIL_FRAMES
                for detail in item.details
            }
            table |= {_key(frame.format(i=name)): Sentence("main", name) for frame in family.vague}
            table |= {
                _key(frame.format(i=name, m=modifier)): Sentence("main", name, modifier)
                for frame in family.exact
                for modifier in family.modifiers
            }
    return table
