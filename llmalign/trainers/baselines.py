"""TRL's own trainers with this project's checkpoints, data and recipes: everybody needs them first."""

import trl

from llmalign.trainers._trl import NamedEvaluations
from llmalign.trainers.checkpoint import SafeCheckpointMixin


class DPOTrainer(SafeCheckpointMixin, NamedEvaluations, trl.DPOTrainer):
    """TRL's DPOTrainer, all of its own losses included; checkpoints are whole or absent, evaluation sets keep names.

    Not covered: the start check, alarms and row-weighted metrics, which `PairTrainer` with `loss="dpo"` has.
    """


class SFTTrainer(SafeCheckpointMixin, NamedEvaluations, trl.SFTTrainer):
    """TRL's SFTTrainer; checkpoints are whole or absent, evaluation sets keep their names."""


class RewardTrainer(SafeCheckpointMixin, NamedEvaluations, trl.RewardTrainer):
    """TRL's RewardTrainer; checkpoints are whole or absent, evaluation sets keep their names."""
