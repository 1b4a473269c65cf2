"""Models on the Hub: what of a run goes there, its card and its hashes, and how it comes back."""
