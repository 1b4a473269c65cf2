"""Pure functions of scores: each takes a dataclass of ``llmalign.types`` and returns one loss per pair or per prompt.

They compute in the dtype they are given and take no mean: that is the trainer's, which alone knows the whole step.
"""

from llmalign.losses.grouped import copg
from llmalign.losses.pairwise import cdpo, dpo, inpo, ipo, irpo, rdpo, ripo, rpo, rslic, slic

__all__ = ["cdpo", "copg", "dpo", "inpo", "ipo", "irpo", "rdpo", "ripo", "rpo", "rslic", "slic"]
