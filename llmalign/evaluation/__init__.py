"""How good a policy is: win rates with their intervals and diversity here, `divergence` and `plots` beside them.

The two others are imported by name, because models and matplotlib are slow to load.
"""

from llmalign.evaluation.diversity import distinct_n, self_bleu
from llmalign.evaluation.winrate import (
    Estimate,
    WinRate,
    bootstrap_mean,
    length_matched,
    paired_difference,
    wilson,
    win_rate,
)

__all__ = [
    "Estimate",
    "WinRate",
    "bootstrap_mean",
    "distinct_n",
    "length_matched",
    "paired_difference",
    "self_bleu",
    "wilson",
    "win_rate",
]
