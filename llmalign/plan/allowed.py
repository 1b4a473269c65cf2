"""Configs under which a recipe can be trained: what its trainer would refuse is never suggested."""

from typing import Any

from llmalign.plan.facts import PROMPTS
from llmalign.plan.sharding import CONFIGS, FSDP2, OFFLOAD, SHARDED, SINGLE, ZERO3
from llmalign.plan.text import TextPlan
from llmalign.trainers.sharding import ADAMW


def configs_for(engine: Any, devices: int) -> list[str]:
    """Names of the configs, on one device `single` alone; notes why others are left out.

    `engine` is a TextPlan or an ImagePlan.
    """
    refused = dict(_refused_text(engine)) if isinstance(engine, TextPlan) else {}
    refused |= _refused(engine.optimizer)
    if devices > 1:
        notes: list[str] = engine.facts.notes if isinstance(engine, TextPlan) else engine.notes
        notes.extend(note for note in dict.fromkeys(refused.values()) if note not in notes)
    return [name for name in CONFIGS if name not in refused and (name == SINGLE) == (devices == 1)]


def _refused(optimizer: Any) -> dict[str, str]:
    if optimizer in ADAMW:
        return {}
    return {OFFLOAD: "zero2_offload takes AdamW alone"}


def _refused_text(engine: TextPlan) -> dict[str, str]:
    """What a trainer of text refuses, and why."""
    facts = engine.facts
    config = facts.config
    refused: dict[str, str] = {}
    if engine.beside:
        refused |= dict.fromkeys(SHARDED, "critic: model is one process or DDP alone")
    elif facts.method == "pf_ppo" and config.advantage == "gae":
        refused[FSDP2] = "a critic is not trained under FSDP2"
    elif facts.method == "rpo" and config.base == "reference":
        refused |= dict.fromkeys(SHARDED, "base: reference cannot draw from a sharded model")
    elif facts.method == "fdpg" and config.proposal == "offline":
        refused |= dict.fromkeys(SHARDED, "proposal: offline keeps a whole copy of the policy")
    if facts.kind == PROMPTS and config.reward_models:
        refused[ZERO3] = "reward models are not gathered under ZeRO-3"
    if facts.outline.quantized is not None:
        refused |= dict.fromkeys((ZERO3, FSDP2), "quantized weights are not sharded: each device holds them whole")
    return refused
