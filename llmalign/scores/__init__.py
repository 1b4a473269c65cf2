"""Token ids in, sequence log-probs (nats, float32) or sampled completions out."""

from llmalign.scores.sampling import sample_completions
from llmalign.scores.text import completion_logps, sequence_logps

__all__ = ["completion_logps", "sample_completions", "sequence_logps"]
