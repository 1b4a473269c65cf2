"""Two locked rooms for code that nobody has read: one for a model's answer, one for the tests that judge it.

`backends` makes a room from what the machine has, `pair` runs two of them and carries messages between, `inside` is
what runs in them. Only `llmalign.rewards.code` is meant to be called from elsewhere.
"""
