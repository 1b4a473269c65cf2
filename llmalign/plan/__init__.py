"""What a run will take, told before anything is trained: memory by part, steps, tokens, time, and what fits where."""
