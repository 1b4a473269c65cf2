"""Image models on the same abstraction: score = minus half a denoising error, then every pairwise loss applies.

The only place that imports diffusers, an extra: UserError where it is not installed. Trainers and their configs are
importable from `llmalign`, which loads this when they are first used.
"""

from importlib.util import find_spec

from llmalign.errors import UserError

if find_spec("diffusers") is None:
    raise UserError("image models need the diffusers package: pip install 'llmalign[diffusion]'")

from transformers.utils import logging  # noqa: E402

# diffusers asks transformers for image processors of torchvision, which nothing here uses, and that is said each time.
_verbosity = logging.get_verbosity()
logging.set_verbosity_error()
try:
    from diffusers import FluxPipeline, StableDiffusionPipeline  # noqa: E402, F401
finally:
    logging.set_verbosity(_verbosity)
