"""How a trainer scores text: one Scorer for all of its models, checked on the first real batch."""

import json
import logging
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.trainer_pt_utils import get_model_param_count
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from llmalign.scores.prefix import Layout
from llmalign.scores.scoring import AUTO, PADDED, Gaps, Scorer, why_not
from llmalign.scores.text import completion_logps
from llmalign.trainers.pair import START_TOLERANCE, share_first
from llmalign.types import PairScores, PromptGroups

logger = logging.getLogger(__name__)

LAYOUT_FILE = "scoring.json"
LENGTH_MATCHED = 0.1  # a pair whose lengths differ by at most this share of the longer one
CHECKED_GROUPS = 2  # several, so that one prompt's tokens could leak into another's; short, since both layouts are run


class TextScores:
    """Sequence log-probs of prompts with their completions, in the layout that `args.scoring` leads to.

    Mixed into a Trainer; `start_scoring` is called once its models are there and before they are wrapped. Checkpoints
    hold the layout, which a resumed run keeps: its first batch is another one and might choose another.
    """

    args: Any
    accelerator: Any
    scorer: Scorer
    _laid_out: tuple[PromptGroups | None, Layout | None] = (None, None)
    _layout_checked = False
    #: the layout that rows are shared out for from the beginning to the end of a run, even if scoring falls back
    _shared_out_for: str | None = None

    def start_scoring(self, model: nn.Module, pad_token_id: int, temperature: float = 1.0) -> None:
        """Choose the layout for a model and make it ready. Raises UserError where the one asked for is impossible."""
        self.scorer = Scorer(
            self.args.scoring,
            pad_token_id=pad_token_id,
            pad_to_multiple_of=self.args.pad_to_multiple_of,
            temperature=temperature,
        )
        self.scorer.choose(model.config)
        self.scorer.attach(model)

    def train(self, resume_from_checkpoint: str | None = None, *args: Any, **kwargs: Any) -> Any:
        """Train, in the layout of the checkpoint where there is one."""
        self._shared_out_for = self.scorer.kind
        if resume_from_checkpoint is not None:
            self._keep_layout(Path(resume_from_checkpoint) / LAYOUT_FILE)
        return super().train(resume_from_checkpoint, *args, **kwargs)  # type: ignore[misc]

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        super()._save_checkpoint(model, trial)  # type: ignore[misc]
        if self.args.should_save:
            name = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"  # type: ignore[attr-defined]
            kept = {"scoring": self.scorer.kind, "shared_out_for": self._shared_out_for}
            folder = Path(self._get_output_dir(trial)) / name  # type: ignore[attr-defined]
            (folder / LAYOUT_FILE).write_text(json.dumps(kept))

    def _keep_layout(self, file: Path) -> None:
        """Score as the run did that wrote a checkpoint, without choosing again, where the model still can."""
        if not file.is_file():
            return
        kept = json.loads(file.read_text())
        possible = kept["scoring"] == PADDED or why_not(self.model.config) is None  # type: ignore[attr-defined]
        if self.scorer.requested not in (AUTO, kept["scoring"]) or not possible:
            return
        self.scorer.kind, self.scorer.reason = kept["scoring"], "as the run began"
        self._shared_out_for = kept["shared_out_for"]
        self._layout_checked = True
        self._laid_out = (None, None)
        logger.info("Scoring: %s, as the run began.", self.scorer.kind)

    def policy_logps(self, model: nn.Module, groups: PromptGroups) -> Tensor:
        """Log-probs (N,) of all completions, prompt by prompt, in nats, float32; `model` may be wrapped."""
        return completion_logps(self.policy_token_logps(model, groups), groups.lengths())

    def policy_token_logps(self, model: nn.Module, groups: PromptGroups) -> Tensor:
        """Log-probs (S,) of the tokens of all completions, completion by completion."""
        return self.scorer.token_logps(model, self.laid_out(model, groups))

    def laid_out(self, model: nn.Module, groups: PromptGroups) -> Layout:
        """A batch as `model` reads it; the layout is checked on the first one."""
        if not self._layout_checked:
            self._check_layout(model, groups)
        if self._laid_out[0] is not groups:  # policy, reference and previous iterate score the same batch
            self._laid_out = (groups, self.scorer.lay_out(groups, self.accelerator.device))
        assert self._laid_out[1] is not None
        return self._laid_out[1]

    def split_gap(self, model: nn.Module, inputs: dict[str, Any]) -> float:
        """See PairTrainerMixin: the same sequences scored together and one by one."""
        with self.accelerator.autocast():
            return self.scorer.split_gap(model, inputs["groups"], device=self.accelerator.device)

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Of one forward and backward pass, for Trainer's `total_flos`: 6 for each parameter and token."""
        return 6 * self.unique_tokens(inputs) * get_model_param_count(self.model)  # type: ignore[attr-defined]

    def unique_tokens(self, inputs: Any) -> int:
        """Tokens of a batch, each prompt's counted once."""
        return sum(inputs["groups"].unique_tokens())

    def _check_layout(self, model: nn.Module, groups: PromptGroups) -> None:
        """Compare the layout with the padded one on short rows of this batch, all ranks alike, until one agrees."""
        self._layout_checked = True
        groups = short_groups(groups, CHECKED_GROUPS)
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


def short_groups(groups: PromptGroups, count: int) -> PromptGroups:
    """The `count` prompts with the fewest tokens, completions included; those with one completion come last."""
    tokens, completions = groups.unique_tokens(), groups.counts()
    order = sorted(range(len(groups)), key=lambda row: (completions[row] < 2, tokens[row]))
    return groups.take(order[:count])


def text_metrics(scores: PairScores, accuracies: Tensor) -> dict[str, Tensor]:
    """What pairs of texts log beside their implicit rewards, (B,) each; `accuracies` are those of the rewards."""
    metrics = {
        "logps/chosen": scores.chosen,
        "logps/rejected": scores.rejected,
        "logps/accuracies": share_first(scores.chosen, scores.rejected),
        "drift/chosen": scores.chosen - scores.ref_chosen,
    }
    if scores.chosen_lengths is not None and scores.rejected_lengths is not None:
        longest = torch.maximum(scores.chosen_lengths, scores.rejected_lengths)
        matched = (scores.chosen_lengths - scores.rejected_lengths).abs() <= LENGTH_MATCHED * longest
        metrics["length/matched"] = matched
        metrics["length/longer_wins"] = share_first(scores.chosen_lengths, scores.rejected_lengths)
        metrics["rewards/accuracies_length_matched"] = accuracies.masked_fill(~matched, torch.nan)
    return metrics
