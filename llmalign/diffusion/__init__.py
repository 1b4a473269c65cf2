"""Image models on the same abstraction: score = minus half a denoising error, then every pairwise loss applies.

The only place that imports diffusers. It holds no trainer yet; text and images will share `trainers.pair`.
"""
