"""Which of a test's many cases the quick suite runs."""

from collections.abc import Collection, Iterable
from typing import Any

import pytest


def all_but(quick: Collection[Any], cases: Iterable[Any]) -> list[Any]:
    """The cases as parameters; those that are not `quick` run with the slow tests alone."""
    return [case if case in quick else pytest.param(case, marks=pytest.mark.slow) for case in cases]
