"""What every trainer of this project has before TRL's or transformers' own: a run that bad days do not spoil."""

from llmalign.trainers.finite import FiniteStepsMixin
from llmalign.trainers.preemption import PreemptionMixin


class SafeRunMixin(FiniteStepsMixin, PreemptionMixin):
    """Finite steps, checkpoints that are whole or not there, one on SIGTERM; the first of a trainer's bases."""
