"""Trainers and their configs; `METHODS` maps the name that a recipe uses to both."""

from dataclasses import dataclass
from typing import Any

from llmalign.trainers.baselines import DPOTrainer, RewardTrainer, SFTTrainer
from llmalign.trainers.configs import (
    CoPGConfig,
    DPOConfig,
    INPOConfig,
    PairConfig,
    RDPOConfig,
    RewardConfig,
    RPOConfig,
    SFTConfig,
)
from llmalign.trainers.copg import CoPGTrainer, OnlineCoPGTrainer
from llmalign.trainers.fdpg import FDPGTrainer
from llmalign.trainers.fdpg_config import FDPGConfig
from llmalign.trainers.mdpo import MDPOTrainer
from llmalign.trainers.pf_ppo import PFPPOTrainer
from llmalign.trainers.pf_ppo_config import PFPPOConfig
from llmalign.trainers.preference import INPOTrainer, PairTrainer, RDPOTrainer, RPOTrainer
from llmalign.trainers.preference_model import PreferenceModelConfig, PreferenceModelTrainer
from llmalign.trainers.preparation import prepare_groups, prepare_pairs, prepare_prompts
from llmalign.trainers.sampled_configs import MDPOConfig, OnlineCoPGConfig

__all__ = [
    "CoPGConfig", "CoPGTrainer", "DPOConfig", "DPOTrainer", "FDPGConfig", "FDPGTrainer", "INPOConfig", "INPOTrainer",
    "MDPOConfig", "MDPOTrainer", "Method", "METHODS", "OnlineCoPGConfig", "OnlineCoPGTrainer", "PairConfig",
    "PairTrainer", "PFPPOConfig", "PFPPOTrainer", "PreferenceModelConfig", "PreferenceModelTrainer", "prepare_groups",
    "prepare_pairs", "prepare_prompts", "RDPOConfig", "RDPOTrainer", "RewardConfig", "RewardTrainer", "RPOConfig",
    "RPOTrainer", "SFTConfig", "SFTTrainer",
]  # fmt: skip


@dataclass(frozen=True)
class Method:
    """What a recipe's `method` stands for; `kind` names the rows it reads (pairs, groups, prompts or text)."""

    name: str
    trainer: Any
    config: Any
    kind: str
    of_images = False


METHODS = {
    method.name: method
    for method in (
        Method("rpo", RPOTrainer, RPOConfig, "pairs"),
        Method("rdpo", RDPOTrainer, RDPOConfig, "pairs"),
        Method("inpo", INPOTrainer, INPOConfig, "pairs"),
        Method("copg", CoPGTrainer, CoPGConfig, "groups"),
        Method("pair", PairTrainer, PairConfig, "pairs"),
        Method("dpo", DPOTrainer, DPOConfig, "pairs"),
        Method("sft", SFTTrainer, SFTConfig, "text"),
        Method("reward", RewardTrainer, RewardConfig, "pairs"),
        Method("copg_online", OnlineCoPGTrainer, OnlineCoPGConfig, "prompts"),
        Method("fdpg", FDPGTrainer, FDPGConfig, "prompts"),
        Method("pf_ppo", PFPPOTrainer, PFPPOConfig, "prompts"),
        Method("mdpo", MDPOTrainer, MDPOConfig, "prompts"),
        Method("preference", PreferenceModelTrainer, PreferenceModelConfig, "pairs"),
    )
}
