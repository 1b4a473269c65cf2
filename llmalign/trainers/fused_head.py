"""The head that TRL's own trainers score through, for a model that no trainer holds."""

from torch import nn
from trl.trainer.utils import add_fused_lm_head


def add_trl_head(model: nn.Module) -> None:
    """Let `model(..., labels=, fused_lm_head=True)` return log-probs, as inside TRL's SFT and DPO trainers."""
    add_fused_lm_head(model, outputs=("log_probs", "entropy", "is_top1"))
