"""How good a policy is: win rates with their intervals, and pictures of its training."""

from llmalign.evaluation.divergence import sampled_kl
from llmalign.evaluation.plots import plot_training
from llmalign.evaluation.winrate import (
    Estimate,
    WinRate,
    bootstrap_mean,
    length_matched,
    paired_difference,
    win_rate,
)

__all__ = [
    "Estimate",
    "WinRate",
    "bootstrap_mean",
    "length_matched",
    "paired_difference",
    "plot_training",
    "sampled_kl",
    "win_rate",
]
