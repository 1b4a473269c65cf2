"""TRL's own trainers with this project's checkpoints, data and recipes: everybody needs them first."""

from typing import Any

import trl

from llmalign.trainers.safe_run import SafeRunMixin


class NamedEvaluations:
    """Gives TRL's own evaluation metrics the name of their set, which TRL leaves out: sets overwrite each other."""

    _metrics: dict[str, Any]

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> Any:
        """Run the evaluation and rename what TRL's `log` will put `eval_` before."""
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)  # type: ignore[misc]
        name = metric_key_prefix.removeprefix("eval").removeprefix("_")
        if name:
            named = {f"{name}_{key}": values for key, values in self._metrics["eval"].items()}
            self._metrics["eval"].clear()
            self._metrics["eval"].update(named)
        return output


class DPOTrainer(SafeRunMixin, NamedEvaluations, trl.DPOTrainer):
    """TRL's DPOTrainer, all of its own losses included; checkpoints are whole or absent, evaluation sets keep names.

    Not covered: the start check, alarms and row-weighted metrics, which `PairTrainer` with `loss="dpo"` has.
    """


class SFTTrainer(SafeRunMixin, NamedEvaluations, trl.SFTTrainer):
    """TRL's SFTTrainer; checkpoints are whole or absent, evaluation sets keep their names."""


class RewardTrainer(SafeRunMixin, NamedEvaluations, trl.RewardTrainer):
    """TRL's RewardTrainer; checkpoints are whole or absent, evaluation sets keep their names."""
