"""The pipelines that a recipe or a command names and nobody downloads."""

from llmalign.diffusion.tiny import ensure_tiny_pipeline

TINY, DIGITS = "embedded:tiny", "embedded:digits"


def pipeline_path(name: str) -> str:
    """Where a pipeline lies: `embedded:tiny` (random) and `embedded:digits` (trained) are made on first use.

    All else is a folder or a Hub name, and is given back.
    """
    if name == TINY:
        return str(ensure_tiny_pipeline())
    if name == DIGITS:
        from llmalign.diffusion.digits import ensure_digits  # scikit-learn and its images, which few runs need

        return str(ensure_digits())
    return name
