"""Rounds of sampling, judging and training from one recipe; see `llmalign.loop.iterate`."""

from llmalign.loop.config import LoopConfig
from llmalign.loop.iterate import iterate

__all__ = ["LoopConfig", "iterate"]
