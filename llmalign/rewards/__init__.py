"""Where rewards for on-policy training come from: reward models, preference oracles, code sandboxes.

Offline trainers read their rewards from the data set, so nothing here is needed by them.
"""
