"""How good a policy is: win rates with their intervals here, `divergence` and `plots` beside them.

The two others are imported by name, because models and matplotlib are slow to load.
"""

from llmalign.evaluation.winrate import (
    Estimate,
    WinRate,
    bootstrap_mean,
    length_matched,
    paired_difference,
    wilson,
    win_rate,
)

__all__ = ["Estimate", "WinRate", "bootstrap_mean", "length_matched", "paired_difference", "wilson", "win_rate"]
