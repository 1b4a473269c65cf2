"""Pure functions of scores: each returns one loss per pair, per prompt, per sample or per sequence.

They compute in the dtype they are given and take no mean: that is the trainer's, which alone knows the whole step.
"""

from llmalign.losses.divergences import (
    DIVERGENCES,
    Divergence,
    clamped,
    exact_divergence,
    fdpg,
    leave_one_out_baseline,
    pseudo_rewards,
)
from llmalign.losses.filters import STRATEGIES, rank_weights, resample, select
from llmalign.losses.grouped import copg
from llmalign.losses.pairwise import cdpo, dpo, inpo, ipo, irpo, rdpo, ripo, rpo, rslic, slic
from llmalign.losses.policy_gradient import annealed_step_size, gae, mdpo, ppo_clip, token_rewards, value_clip, whiten

__all__ = [
    "DIVERGENCES",
    "STRATEGIES",
    "Divergence",
    "annealed_step_size",
    "cdpo",
    "clamped",
    "copg",
    "dpo",
    "exact_divergence",
    "fdpg",
    "gae",
    "inpo",
    "ipo",
    "irpo",
    "leave_one_out_baseline",
    "mdpo",
    "ppo_clip",
    "pseudo_rewards",
    "rank_weights",
    "rdpo",
    "resample",
    "ripo",
    "rpo",
    "rslic",
    "select",
    "slic",
    "token_rewards",
    "value_clip",
    "whiten",
]
