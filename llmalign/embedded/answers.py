"""Answers of the embedded world, in styles from helpful to rude."""

import random
from dataclasses import dataclass
from functools import partial

from llmalign.embedded import words
from llmalign.embedded.grammar import Prompt, as_sentence, prompts


@dataclass(frozen=True)
class Style:
    """How one kind of answer is put together; numbers are probabilities unless said otherwise.

    `subject` says what the main sentence is about: `exact` (the item and modifier of the prompt), `vague` (the item
    alone), `mistaken` (the item with another modifier) or `astray` (another prompt altogether). `opening` and
    `closing` name the manners to draw from. `dodges` and `copies` are ranges of counts: evasive sentences, and copies
    of the main sentence.
    """

    share: float
    subject: str = "exact"
    main: float = 1.0
    reason: float = 0.5
    details: tuple[float, ...] = (0.5,)
    opening: tuple[str, ...] = ("courteous", "plain")
    opens: float = 0.5
    closing: tuple[str, ...] = ("courteous", "plain")
    closes: float = 0.5
    dodges: tuple[int, int] = (0, 0)
    copies: tuple[int, int] = (1, 1)


STYLES: dict[str, Style] = {
    "helpful": Style(0.20, reason=1.0, details=(0.6,), opening=("courteous",), opens=1.0, closing=("courteous",)),
    "sober": Style(0.16, details=(0.5,), opening=("plain",), opens=0.4, closing=("plain",), closes=0.4),
    "curt": Style(0.12, subject="vague", reason=0.4, details=(), opening=("plain",), opens=0.2, closes=0.4),
    "mistaken": Style(0.12, subject="mistaken", details=(0.7,), opens=0.6, closes=0.6),
    "rude": Style(
        0.12, main=0.8, reason=0.6, details=(0.7,), opening=("rude",), opens=1.0, closing=("rude",), closes=0.7
    ),
    "astray": Style(0.12, subject="astray", reason=0.7, details=(0.8, 0.5), opens=0.6, closes=0.7),
    "evasive": Style(0.06, main=0.2, reason=0.0, details=(), opens=0.7, closes=0.6, dodges=(1, 4)),
    "repetitive": Style(0.05, reason=0.4, details=(), opens=0.2, closes=0.2, copies=(2, 3)),
    "rambling": Style(0.05, reason=1.0, details=(1.0, 1.0), opens=1.0, closes=1.0),
}


def _main(family: words.Family, item: words.Item, modifier: str | None, reason: float, rng: random.Random) -> str:
    frames = family.vague if modifier is None else family.exact
    phrase = rng.choice(frames).format(i=item.name, m=modifier)
    if rng.random() < reason:
        phrase += " " + rng.choice(words.REASON_FRAMES).format(r=rng.choice(item.reasons))
    return phrase


def compose(prompt: Prompt, rng: random.Random, style: str | None = None) -> str:
    """One answer to a prompt; the style is drawn by its share when None. Every sentence is grammatical."""
    if style is None:
        style = rng.choices(list(STYLES), [one.share for one in STYLES.values()])[0]
    plan = STYLES[style]
    subject = prompt
    if plan.subject == "astray":
        subject = rng.choice(prompts())
        while subject.item == prompt.item:
            subject = rng.choice(prompts())
    family = words.FAMILIES[subject.family]
    item = next(item for item in family.items if item.name == subject.item)
    modifier: str | None = subject.modifier
    if plan.subject == "mistaken":
        modifier = rng.choice([other for other in family.modifiers if other != modifier])
    elif plan.subject == "vague":
        modifier = None

    say = partial(_draw_manner, rng)
    phrases = say(words.OPENINGS, plan.opening, plan.opens)
    if rng.random() < plan.main:
        phrases += [_main(family, item, modifier, plan.reason, rng)] * rng.randint(*plan.copies)
    phrases += rng.sample(words.DODGES, rng.randint(*plan.dodges))
    for chance, detail in zip(plan.details, rng.sample(item.details, len(plan.details)), strict=True):
        if rng.random() < chance:
            phrases.append(rng.choice(words.DETAIL_FRAMES).format(d=detail))
    phrases += say(words.CLOSINGS, plan.closing, plan.closes)
    return " ".join(as_sentence(phrase) for phrase in phrases or [rng.choice(words.DODGES)])


def _draw_manner(
    rng: random.Random, table: dict[str, tuple[str, ...]], manners: tuple[str, ...], chance: float
) -> list[str]:
    """One phrase in one of the manners with the given chance, else none."""
    return [rng.choice(table[rng.choice(manners)])] if rng.random() < chance else []
