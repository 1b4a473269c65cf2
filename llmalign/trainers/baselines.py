"""TRL's own trainers with this project's checkpoints, data and recipes: everybody needs them first."""

import trl

from llmalign.trainers.checkpoint import SafeCheckpointMixin


class DPOTrainer(SafeCheckpointMixin, trl.DPOTrainer):
    """TRL's DPOTrainer, all of its own losses included, with checkpoints that are whole or absent."""


class SFTTrainer(SafeCheckpointMixin, trl.SFTTrainer):
    """TRL's SFTTrainer with checkpoints that are whole or absent."""


class RewardTrainer(SafeCheckpointMixin, trl.RewardTrainer):
    """TRL's RewardTrainer with checkpoints that are whole or absent."""
