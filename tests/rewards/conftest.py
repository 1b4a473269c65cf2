"""The sandboxes that this machine offers; tests that need one are skipped with the reason where there is none."""

import pytest

from llmalign.errors import UserError
from llmalign.rewards.sandbox.choice import find_backend


def _usable(name: str | None) -> str:
    try:
        return find_backend(name).name
    except UserError as error:
        pytest.skip(str(error))


@pytest.fixture(params=["bubblewrap", "landlock"])
def backend(request: pytest.FixtureRequest) -> str:
    """Each kind of sandbox in turn."""
    return _usable(request.param)


@pytest.fixture
def some_backend() -> str:
    """The sandbox that is used where none is named."""
    return _usable(None)
