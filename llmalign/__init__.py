"""llmalign: preference optimisation whose losses are the papers' losses.

Trainers and configs are importable from here; they are loaded on first use, so that `import llmalign` stays quick.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llmalign.trainers import (
        CoPGConfig,
        CoPGTrainer,
        DPOConfig,
        DPOTrainer,
        FDPGConfig,
        FDPGTrainer,
        INPOConfig,
        INPOTrainer,
        MDPOConfig,
        MDPOTrainer,
        OnlineCoPGConfig,
        OnlineCoPGTrainer,
        PairConfig,
        PairTrainer,
        PFPPOConfig,
        PFPPOTrainer,
        PreferenceModelConfig,
        PreferenceModelTrainer,
        RDPOConfig,
        RDPOTrainer,
        RewardConfig,
        RewardTrainer,
        RPOConfig,
        RPOTrainer,
        SFTConfig,
        SFTTrainer,
    )

__version__ = "0.1.0"

__all__ = [
    "CoPGConfig",
    "CoPGTrainer",
    "DPOConfig",
    "DPOTrainer",
    "FDPGConfig",
    "FDPGTrainer",
    "INPOConfig",
    "INPOTrainer",
    "MDPOConfig",
    "MDPOTrainer",
    "OnlineCoPGConfig",
    "OnlineCoPGTrainer",
    "PFPPOConfig",
    "PFPPOTrainer",
    "PairConfig",
    "PairTrainer",
    "PreferenceModelConfig",
    "PreferenceModelTrainer",
    "RDPOConfig",
    "RDPOTrainer",
    "RPOConfig",
    "RPOTrainer",
    "RewardConfig",
    "RewardTrainer",
    "SFTConfig",
    "SFTTrainer",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'llmalign' has no attribute {name!r}")
    return getattr(import_module("llmalign.trainers"), name)
