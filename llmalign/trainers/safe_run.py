"""What every trainer of this project has before TRL's or transformers' own: a run that bad days do not spoil."""

from llmalign.trainers.finite_weights import FiniteWeightsMixin
from llmalign.trainers.preemption import PreemptionMixin


class SafeRunMixin(FiniteWeightsMixin, PreemptionMixin):
    """Finite steps and weights, whole checkpoints or none, one on SIGTERM; the first of a trainer's bases."""
