"""How good a policy is: win rates with their intervals and diversity here, all else in modules of their own.

`generate` and `annotate` make AlpacaEval's files, `alpaca` its numbers; `accuracy`, `benchmarks`, `divergence` and
`plots` are imported by name too, because models and matplotlib are slow to load.
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
