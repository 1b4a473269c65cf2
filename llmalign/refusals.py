"""What a library refuses of a recipe, in one sentence; what this package gets wrong keeps its traceback."""

import logging
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import llmalign
from llmalign.errors import UserError

logger = logging.getLogger(__name__)

_HOME = Path(llmalign.__file__).parent


@contextmanager
def refusals(
    blame: Callable[[Exception], str], what: str, *, unless: Callable[[], bool] = lambda: False
) -> Iterator[None]:
    """Turn an exception that a library raised into a UserError: `what` could not be done, the library and its words.

    `blame` adds where the value came from. A UserError, an interrupt, whatever was raised by this package's own lines,
    and everything once `unless` holds, pass as they are. The traceback is logged at the level DEBUG.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        library = _raised_by(error)
        if library is None or unless():
            raise
        logger.debug("%s.", what, exc_info=True)
        said = " ".join(str(error).split())[:300] or "without a word"
        sentence = f"{what}: {library} says {type(error).__name__}: {said.rstrip('.')}."
        raise UserError(blame(ValueError(sentence))) from error


def _raised_by(error: Exception) -> str | None:
    """The library whose line raised the error, or None where it was one of this package."""
    frames = traceback.extract_tb(error.__traceback__)
    file = Path(frames[-1].filename)
    if file.is_relative_to(_HOME):
        return None
    parts = file.parts
    return parts[parts.index("site-packages") + 1] if "site-packages" in parts[:-1] else "Python"
