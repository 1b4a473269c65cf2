"""Moving averages of what is logged, and the guard against winners that are denoised ever worse."""

import logging
import math
from typing import Any

from transformers import Trainer

logger = logging.getLogger(__name__)

AVERAGED = ("rewards/accuracies", "rewards/margins", "error/winner_ratio")
AVERAGE = "_average"
WEIGHT = 0.9
RATIO = "error/winner_ratio"


class Monitor(Trainer):
    """Adds exponential moving averages to training logs and acts as `args.winner_guard` says; after the pair mixin.

    Scores of single batches are noisy, because every pair meets one timestep and one noise. The averages are functions
    of the log, so that a resumed run goes on with them.
    """

    _warn_again = 0.0  # said once, and at every doubling

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """See Trainer; training logs also get their averages."""
        if logs.get("error/ref_chosen"):  # there may be no reference
            logs[RATIO] = logs["error/chosen"] / logs["error/ref_chosen"]
        for name in AVERAGED:
            if name in logs:
                logs[name + AVERAGE] = moving_average(self._last(name + AVERAGE), logs[name])
        super().log(logs, start_time)
        if RATIO + AVERAGE in logs:
            self._guard(logs[RATIO + AVERAGE])

    def _last(self, name: str) -> float | None:
        return next((entry[name] for entry in reversed(self.state.log_history) if name in entry), None)

    def _guard(self, ratio: float) -> None:
        args: Any = self.args
        if args.winner_guard == "off" or ratio <= args.winner_error_limit:
            return
        found = (
            f"the winners' denoising error is {ratio:.2f} times the reference's (winner_error_limit "
            f"{args.winner_error_limit:g}), as when both pictures of a pair are unlearned"
        )
        if args.winner_guard == "stop":
            logger.warning("Stopped at step %d: %s; raise beta or lower the rate.", self.state.global_step, found)
            self.control.should_training_stop = self.control.should_save = True
        elif ratio >= self._warn_again:
            self._warn_again = 2 * ratio
            logger.warning(
                "At step %d %s; look at samples, raise beta, or set winner_guard: stop.", self.state.global_step, found
            )


def moving_average(old: float | None, new: float) -> float:
    """The next value of an exponential moving average that starts at its first finite value."""
    return new if old is None or not math.isfinite(old) else WEIGHT * old + (1 - WEIGHT) * new
