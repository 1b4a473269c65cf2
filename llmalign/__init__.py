"""llmalign: preference optimisation whose losses are the papers' losses.

Trainers and configs are importable from here; they are loaded on first use, so that `import llmalign` stays quick.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llmalign.diffusion.online import D3POConfig, D3POTrainer, PSOConfig, PSOTrainer
    from llmalign.diffusion.pso import PSOOfflineConfig, PSOOfflineTrainer
    from llmalign.diffusion.seppo import SePPOConfig, SePPOTrainer
    from llmalign.diffusion.trainer import DiffusionPreferenceConfig, DiffusionPreferenceTrainer
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
    "D3POConfig",
    "D3POTrainer",
    "DPOConfig",
    "DPOTrainer",
    "DiffusionPreferenceConfig",
    "DiffusionPreferenceTrainer",
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
    "PSOConfig",
    "PSOOfflineConfig",
    "PSOOfflineTrainer",
    "PSOTrainer",
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
    "SePPOConfig",
    "SePPOTrainer",
]


# Where what begins so lies: image models need diffusers, an extra, which nothing else here imports.
_OF_IMAGES = {
    "DiffusionPreference": "trainer",
    "D3PO": "online",
    "PSO": "online",
    "PSOOffline": "pso",
    "SePPO": "seppo",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'llmalign' has no attribute {name!r}")
    method = name.removesuffix("Trainer").removesuffix("Config")
    home = f"llmalign.diffusion.{_OF_IMAGES[method]}" if method in _OF_IMAGES else "llmalign.trainers"
    return getattr(import_module(home), name)
