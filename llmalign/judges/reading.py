"""From a judge's answer to the probability that the first answer is better, and which of two stands first."""

import math
import random
import re
from collections.abc import Mapping

Letters = tuple[str, str]


def logprob_preference(logprobs: Mapping[str, float], letters: Letters) -> float | None:
    """P(first letter) against the second among the likeliest first tokens; None where neither is among them.

    White space around a token does not count, and tokens that differ in nothing else are one.
    """
    lps = [[lp for token, lp in logprobs.items() if token.strip() == letter] for letter in letters]
    largest = max((lp for found in lps for lp in found), default=-math.inf)
    if largest == -math.inf:
        return None
    # Relative to the largest: the masses of two unlikely letters would both be 0.
    first, second = (math.fsum(math.exp(lp - largest) for lp in found) for found in lps)
    return first / (first + second)


def letter_preference(text: str, letters: Letters) -> float | None:
    """1 or 0 for the one letter that stands in a text as a word of its own; None where it is neither or both."""
    found = [re.search(rf"(?<!\w){re.escape(letter)}(?!\w)", text) is not None for letter in letters]
    return None if found[0] == found[1] else float(found[0])


def is_switched(instruction: str, seed: int = 0) -> bool:
    """Whether AlpacaEval shows the answers to an instruction in reversed order."""
    return random.Random("is_switched_outputs" + instruction + str(seed)).choices([False, True])[0]
