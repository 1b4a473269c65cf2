"""Rounds of sampling, judging and training from one recipe; see `llmalign.loop.rounds`."""

from llmalign.loop.config import LoopConfig
from llmalign.loop.rounds import iterate

__all__ = ["LoopConfig", "iterate"]
