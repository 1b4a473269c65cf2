"""Openings of children's stories, and preferences between stories that read their words: for small story models.

`livelier` is transitive: of two stories the one with more of what a lively story has is likelier to be preferred.
`intransitive` is not: animals beat food, food beats the outdoors, the outdoors beat animals, each beats none of them.
"""

import math
import random
import re
from collections.abc import Sequence

WORDS = {
    "animal": (
        "animal bear bee bird bug bunny butterfly cat chicken cow dog duck elephant fish fox frog goat horse kitten "
        "kitty lion monkey mouse owl pig puppy rabbit sheep snail snake squirrel turtle wolf"
    ),
    "food": (
        "apple banana berry bread cake candy carrot cheese chocolate cook cookie delicious dinner eat ate food fruit "
        "honey hungry juice lunch milk pie pizza sandwich soup tasty yummy"
    ),
    "outdoors": (
        "beach flower forest garden grass hill lake mountain outside park playground pond river sea sky sun tree woods "
        "yard"
    ),
    "friend": "friend share help hug kind together",
    "feeling": "afraid angry brave excited happy proud sad scared smile surprised cry laugh",
    "speech": "ask asked reply replied said say shout shouted",
}
CLASSES = ("animal", "food", "outdoors", "none")
#: P(row beats column) of the classes
CYCLE = ((0.5, 0.8, 0.2, 0.8), (0.2, 0.5, 0.8, 0.8), (0.8, 0.2, 0.5, 0.8), (0.2, 0.2, 0.2, 0.5))

_TRAIT = {word: trait for trait, words in WORDS.items() for word in words.split()}
_KINDS = ("little", "big", "small", "happy", "kind", "brave", "silly", "shy", "clever", "old")
_HEROES = ("girl", "boy", "dog", "cat", "bird", "bear", "bunny", "mouse", "frog", "duck")
_NAMES = ("Lily", "Tim", "Max", "Sue", "Ben", "Mia", "Tom", "Anna", "Jack", "Lucy", "Sam", "Amy", "Bob", "Spot")


def openings(count: int, seed: int = 0) -> list[str]:
    """Different openings, at most 1,400, in a random order."""
    every = [
        f"Once upon a time, there was a {kind} {hero} named {name}."
        for kind in _KINDS for hero in _HEROES for name in _NAMES
    ]  # fmt: skip
    return random.Random(f"openings {seed}").sample(every, count)


def liveliness(story: str) -> int:
    """How many of the six traits a story has, read from its words alone."""
    return len({trait for trait in map(_trait_of, _words(story)) if trait is not None})


def story_class(story: str) -> int:
    """The class of a story, an index into CLASSES: that of its first word about an animal, food or the outdoors."""
    found = (trait for trait in map(_trait_of, _words(story)) if trait in CLASSES)
    return CLASSES.index(next(found, "none"))


def livelier(prompts: Sequence[str], first: Sequence[str], second: Sequence[str]) -> list[float]:
    """P(first beats second) of pairs of stories: the logistic function of the difference of their liveliness."""
    return [1 / (1 + math.exp(liveliness(b) - liveliness(a))) for a, b in zip(first, second, strict=True)]


def intransitive(prompts: Sequence[str], first: Sequence[str], second: Sequence[str]) -> list[float]:
    """P(first beats second) of pairs of stories, by their classes."""
    return [CYCLE[story_class(a)][story_class(b)] for a, b in zip(first, second, strict=True)]


def _words(story: str) -> list[str]:
    return re.findall(r"[a-z]+", story.lower())


def _trait_of(word: str) -> str | None:
    """The trait of a word or of its plural."""
    return _TRAIT.get(word) or _TRAIT.get(word.removesuffix("s")) or _TRAIT.get(word.removesuffix("es"))
