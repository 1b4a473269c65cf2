"""What the quickstarts show: one bar with the loss, and nothing of the libraries' own."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import datasets
import transformers
from transformers import ProgressCallback


class LossBar(ProgressCallback):
    """The trainers' progress bar with the loss beside it, instead of a printed dictionary a log."""

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Show the loss."""
        if self.training_bar is not None and logs is not None and "loss" in logs:
            self.training_bar.set_postfix(loss=f"{logs['loss']:.3f}")


@contextmanager
def quiet() -> Iterator[None]:
    """Keep the libraries' own bars and notes off the screen while the quickstart's are on it."""
    verbosity = transformers.logging.get_verbosity()
    rows, weights = not datasets.are_progress_bars_disabled(), transformers.logging.is_progress_bar_enabled()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(verbosity)
        if rows:
            datasets.enable_progress_bars()
        if weights:
            transformers.logging.enable_progress_bar()
