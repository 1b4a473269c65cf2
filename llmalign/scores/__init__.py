"""Token ids in, sequence log-probs (nats, float32) or sampled completions out."""

from llmalign.scores.sampling import sample_completions
from llmalign.scores.scoring import Scorer
from llmalign.scores.text import sequence_logps

__all__ = ["Scorer", "sample_completions", "sequence_logps"]
