"""What tests that launch several processes share."""

import importlib.util

import pytest

#: marks of a test under DeepSpeed, which takes minutes
NEEDS_DEEPSPEED = (
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("deepspeed") is None, reason="needs DeepSpeed: pip install 'llmalign[deepspeed]'"
    ),
)
