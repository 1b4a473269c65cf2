"""How a trainer scores text: one Scorer for all of its models, checked on the first real batch."""

from typing import Any

import torch
from torch import Tensor, nn

from llmalign.scores.prefix import Layout
from llmalign.scores.scoring import PADDED, Gaps, Scorer
from llmalign.trainers.pair import START_TOLERANCE
from llmalign.types import PromptGroups


class TextScores:
    """Sequence log-probs of prompts with their completions, in the layout that `args.scoring` leads to.

    Mixed into a Trainer; `start_scoring` is called once its models are there and before they are wrapped.
    """

    args: Any
    accelerator: Any
    scorer: Scorer
    _laid_out: tuple[PromptGroups | None, Layout | None] = (None, None)
    _layout_checked = False

    def start_scoring(self, model: nn.Module, pad_token_id: int) -> None:
        """Choose the layout for a model and make it ready. Raises UserError where the one asked for is impossible."""
        self.scorer = Scorer(
            self.args.scoring, pad_token_id=pad_token_id, pad_to_multiple_of=self.args.pad_to_multiple_of
        )
        self.scorer.choose(model.config)
        self.scorer.attach(model)

    def policy_logps(self, model: nn.Module, groups: PromptGroups) -> Tensor:
        """Log-probs (N,) of all completions, prompt by prompt, in nats, float32; `model` may be wrapped."""
        if not self._layout_checked:
            self._check_layout(model, groups)
        if self._laid_out[0] is not groups:  # policy, reference and previous iterate score the same batch
            self._laid_out = (groups, self.scorer.lay_out(groups, self.accelerator.device))
        assert self._laid_out[1] is not None
        return self.scorer.score(model, self._laid_out[1])

    def split_gap(self, model: nn.Module, inputs: dict[str, Any]) -> float:
        """See PairTrainerMixin: the same sequences scored together and one by one."""
        with self.accelerator.autocast():
            return self.scorer.split_gap(model, inputs["groups"], device=self.accelerator.device)

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Of one forward and backward pass, for Trainer's `total_flos`: 6 for each parameter and token."""
        tokens = sum(inputs["groups"].unique_tokens())
        return 6 * tokens * sum(parameter.numel() for parameter in self.model.parameters())  # type: ignore[attr-defined]

    def _check_layout(self, model: nn.Module, groups: PromptGroups) -> None:
        """Compare the layout with the padded one on this batch, all ranks alike, until one agrees."""
        self._layout_checked = True
        exact = self.accelerator.mixed_precision == "no" and next(model.parameters()).dtype == torch.float32
        while self.scorer.kind != PADDED:
            with self.accelerator.autocast():
                own = self.scorer.gaps(
                    model, groups, device=self.accelerator.device, exact=exact, limit=START_TOLERANCE
                )
            # The rank whose gap exceeds its limit by most speaks for all; a NaN does so anyway.
            gathered = self.accelerator.gather(
                torch.tensor([[own.gap, own.limit]], dtype=torch.float64, device=self.accelerator.device)
            )
            worst = (gathered[:, 0] - gathered[:, 1]).argmax()
            gaps = Gaps(*gathered[worst].tolist())
            self.scorer.settle(gaps)
            if gaps.passed:
                return
        self.scorer.say_padded()
