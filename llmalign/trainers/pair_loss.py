"""Which pairwise loss a run minimises: its name and hyper-parameters in a config, its call in a trainer."""

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from llmalign import losses
from llmalign.errors import UserError
from llmalign.trainers.validation import check_flip_rate, positive, require
from llmalign.types import PairScores

HYPER_PARAMETERS: dict[str, tuple[str, ...]] = {
    "dpo": ("beta",),
    "cdpo": ("beta", "flip_rate"),
    "ipo": ("tau",),
    "slic": ("beta",),
    "rpo": ("beta", "eta"),
    "irpo": ("beta", "alpha"),
    "rdpo": ("beta", "flip_rate"),
    "ripo": ("tau", "flip_rate"),
    "rslic": ("beta", "flip_rate"),
    "inpo": ("eta", "tau"),
}
UNBOUNDED = ("rdpo", "rslic")


def check_pair_loss(args: Any, known: Mapping[str, tuple[str, ...]]) -> None:
    """Raise UserError unless `args.loss` is one of the known losses and exactly its hyper-parameters are set."""
    require(args.loss in known, "loss", args.loss, f"one of {', '.join(known)}")
    wanted = known[args.loss]
    for name in ("tau", "flip_rate", "eta", "alpha"):
        value = getattr(args, name)
        if name in wanted and value is None:
            raise UserError(f"loss: {args.loss} needs {name}")
        if name not in wanted and value is not None:
            raise UserError(f"loss: {args.loss} has no {name}; it takes {', '.join(wanted)}")
    may_be_zero = ("alpha", "tau") if args.loss == "inpo" else ("alpha", "eta")
    positive(args, *(name for name in wanted if name not in ("flip_rate", *may_be_zero)))
    if "flip_rate" in wanted:
        check_flip_rate(args, 1.0 if args.loss == "cdpo" else 0.5, closed=args.loss == "cdpo")
    for name in may_be_zero:
        if name in wanted:
            value = getattr(args, name)
            require(math.isfinite(value) and value >= 0, name, value, "zero or a positive finite number")


class PairLoss:
    """Minimises the function of `llmalign.losses` that `args.loss` names; mixed into a trainer of pair scores."""

    args: Any

    @property
    def hyper_parameters(self) -> dict[str, Any]:
        """The keywords of the loss."""
        return {name: getattr(self.args, name) for name in HYPER_PARAMETERS[self.args.loss]}

    @property
    def reward_scale(self) -> float:
        """beta, or tau for the losses that have no beta (INPO without pull to the reference: eta)."""
        known = self.hyper_parameters
        return known["beta"] if "beta" in known else known["tau"] or known["eta"]

    def loss_terms(self, scores: PairScores, inputs: dict[str, Any]) -> dict[str, Tensor]:
        """The chosen loss, one term."""
        return {self.args.loss: getattr(losses, self.args.loss)(scores, **self.hyper_parameters)}
