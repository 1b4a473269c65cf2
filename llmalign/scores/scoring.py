"""Which layout a batch is scored in: the fastest one that is proven for the architecture, checked on a real batch."""

import logging
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from llmalign.errors import UserError
from llmalign.scores.prefix import FLEX, IMPLEMENTATIONS, Forest, Layout, lay_out_trees, register_attention
from llmalign.scores.rounding import rounded_limit
from llmalign.scores.text import add_compact_head, completion_logps, is_attached, lay_out_padded, most_over_ranks
from llmalign.types import PromptGroups

logger = logging.getLogger(__name__)

AUTO, SHARED_PROMPT, PADDING_FREE, PADDED = "auto", "shared_prompt", "padding_free", "padded"
KINDS = (AUTO, SHARED_PROMPT, PADDING_FREE, PADDED)
#: the next layout to fall back on
SLOWER = {SHARED_PROMPT: PADDING_FREE, PADDING_FREE: PADDED}

#: Architectures whose decoder is proven to score trees exactly, by model type. tests/scores/test_proven.py proves
#: each: log-probs and gradients equal the padded layout's.
PROVEN = frozenset(
    {"llama", "mistral", "qwen2", "qwen3", "qwen3_moe", "gemma", "phi3", "olmo2"}
)  # fmt: skip


def why_not(config: PretrainedConfig) -> str | None:
    """Why a model of this config cannot be scored without padding; None where it can."""
    if config.model_type not in PROVEN:
        return f"the architecture {config.model_type} is not proven for it"
    if batch_dependent(config):
        return "its rotary embeddings change with the longest position of the batch"
    if config._attn_implementation not in (*IMPLEMENTATIONS, *IMPLEMENTATIONS.values()):
        return f"attention {config._attn_implementation} cannot read it; use sdpa, flash_attention_2 or flex_attention"
    return None


def batch_dependent(config: PretrainedConfig) -> bool:
    """Whether scores depend on the longest sequence of the batch, as under dynamically scaled rotary embeddings."""
    rope = config.to_dict().get("rope_parameters") or {}
    return rope.get("rope_type") in ("dynamic", "longrope")


def shortest_window(config: PretrainedConfig) -> int | None:
    """Tokens that the narrowest sliding-window layer sees; None where every layer sees everything."""
    known = config.to_dict()
    window = known.get("sliding_window")
    if window is None or known.get("use_sliding_window") is False:
        return None
    layers = known.get("layer_types")
    return window if layers is None or "sliding_attention" in layers else None


@dataclass(frozen=True)
class Gaps:
    """How far a layout's scores are from the padded ones on a batch, and how far they may be (nats per sequence)."""

    gap: float
    limit: float

    @property
    def passed(self) -> bool:
        """False for a NaN as well."""
        return self.gap <= self.limit


class Scorer:
    """Scores prompts with their completions under the models that are attached to it.

    `requested` is `auto` or a layout; `auto` takes the fastest that is proven for the first attached model and falls
    back, with a logged sentence, where the first real batch disagrees with the padded layout. Raises UserError where a
    layout is asked for by name and cannot be used. Not covered: prompt-learning adapters, images.
    """

    def __init__(
        self, requested: str, *, pad_token_id: int, pad_to_multiple_of: int | None = None, temperature: float = 1.0
    ) -> None:
        self.requested = requested
        self.kind = PADDED
        self.reason = ""
        self._pad_token_id = pad_token_id
        self._multiple_of = pad_to_multiple_of
        self._temperature = temperature
        self._window: int | None = None
        self._flex = False
        self._said_window = False

    def choose(self, config: PretrainedConfig) -> None:
        """Settle on a layout for a model's config; the choice is `kind`, and `reason` says why."""
        obstacle = why_not(config)
        if obstacle is None and self._multiple_of:
            obstacle = "pad_to_multiple_of asks for padded rows"
        self._window = shortest_window(config)
        self._flex = config._attn_implementation == FLEX
        if self.requested == AUTO:
            self.kind = SHARED_PROMPT if obstacle is None else PADDED
            self.reason = obstacle or f"proven for {config.model_type}"
        elif self.requested != PADDED and obstacle is not None:
            raise UserError(f"scoring: {self.requested} is not possible: {obstacle}; set scoring: auto")
        else:
            self.kind, self.reason = self.requested, "asked for"

    def attach(self, model: nn.Module) -> None:
        """Prepare a language model, or one with an adapter, before it is wrapped for training; again does nothing."""
        if isinstance(model, PeftModel) and model.active_peft_config.is_prompt_learning:
            raise UserError("prompt-learning adapters put virtual tokens before the prompt; use LoRA instead")
        language_model: PreTrainedModel = model.get_base_model() if isinstance(model, PeftModel) else model
        if is_attached(language_model):
            return
        add_compact_head(language_model, self._temperature)
        if why_not(language_model.config) is None:
            register_attention()
            current = language_model.config._attn_implementation
            language_model.set_attn_implementation(IMPLEMENTATIONS.get(current, current))
            _skip_unscored_rows(language_model)

    def lay_out(self, groups: PromptGroups, device: torch.device, kind: str | None = None) -> Layout:
        """Lay a batch out for the model; sequences longer than a sliding window are padded."""
        kind = kind or self._kind_for(groups)
        if kind == PADDED:
            return lay_out_padded(groups, pad_token_id=self._pad_token_id, device=device, multiple_of=self._multiple_of)
        return lay_out_trees(groups, share=kind == SHARED_PROMPT, device=device, flex=self._flex)

    def logps(self, model: nn.Module, groups: PromptGroups, *, device: torch.device, kind: str | None = None) -> Tensor:
        """Log-probs (N,) of all completions in nats, float32, with gradients; `model` may be wrapped."""
        return self.score(model, self.lay_out(groups, device, kind))

    def score(self, model: nn.Module, layout: Layout) -> Tensor:
        """Log-probs (N,) of a batch that is laid out, so that several models can score it."""
        return completion_logps(self.token_logps(model, layout), layout.lengths)

    def token_logps(self, model: nn.Module, layout: Layout) -> Tensor:
        """Log-probs (S,) of the tokens of all completions, completion by completion."""
        return model(**layout.inputs, scored=layout.scored, targets=layout.targets)

    def _kind_for(self, groups: PromptGroups) -> str:
        if self._window is None or self.kind == PADDED:
            return self.kind
        longest = max(len(prompt) + len(completion) for prompt, completion in groups.sequences())
        if longest <= self._window:
            return self.kind
        if not self._said_window:
            self._said_window = True
            logger.info(
                "Scoring: batches with a sequence longer than the sliding window of %d tokens are padded.", self._window
            )
        return PADDED

    @torch.no_grad()
    def gaps(self, model: nn.Module, groups: PromptGroups, *, device: torch.device, exact: bool, limit: float) -> Gaps:
        """Compare the chosen layout with the padded one on a batch; in low precision with the batch's own noise."""
        padded = self.logps(model, groups, device=device, kind=PADDED)
        gap = (self.logps(model, groups, device=device) - padded).abs().max()
        limit = rounded_limit(limit, float(padded.abs().max()))
        if not exact:
            limit = max(limit, 2 * self.split_gap(model, groups, device=device))
        return Gaps(float(gap), limit)

    @torch.no_grad()
    def split_gap(self, model: nn.Module, groups: PromptGroups, *, device: torch.device) -> float:
        """Largest change (nats) of a padded score when the batch is split into single sequences."""
        whole = self.logps(model, groups, device=device, kind=PADDED)
        sequences = groups.sequences()
        idle = most_over_ranks(len(sequences), device) - len(sequences)
        single = [
            self.logps(model, PromptGroups([prompt], [[completion]]), device=device, kind=PADDED)
            for prompt, completion in [*sequences, *sequences[:1] * idle]
        ]
        return float((whole - torch.cat(single)[: len(sequences)]).abs().max())

    def settle(self, gaps: Gaps) -> None:
        """Keep the layout if its check passed, else take the next slower one; refuse if it was asked for by name.

        `gaps` must be the same on all ranks.
        """
        if gaps.passed:
            logger.info(
                "Scoring: %s (%s); its first batch is %.1e nats from the padded layout (limit %.1e).",
                self.kind, self.reason, gaps.gap, gaps.limit,
            )  # fmt: skip
            return
        if self.requested != AUTO:
            raise UserError(
                f"scoring: {self.kind} is {gaps.gap:.3g} nats from the padded layout on the first batch (limit "
                f"{gaps.limit:.3g}), so it is wrong for this model; set scoring: padded"
            )
        slower = SLOWER[self.kind]
        logger.warning(
            "Scoring: %s is %.3g nats from the padded layout on the first batch (limit %.3g); falling back on %s.",
            self.kind, gaps.gap, gaps.limit, slower,
        )  # fmt: skip
        self.kind, self.reason = slower, f"{self.kind} failed its check"

    def say_padded(self) -> None:
        """Log that batches are padded, and why."""
        logger.info("Scoring: padded (%s).", self.reason)


def _skip_unscored_rows(model: PreTrainedModel) -> None:
    """Let the last layer's feed-forward part run only where a hidden state is scored: nothing reads the others."""
    layer = model.base_model.layers[-1]
    current: list[Forest | None] = [None]

    def enter(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        current[0] = kwargs.get("branches")

    def select(module: nn.Module, args: tuple[Tensor, ...]) -> Any:
        forest = current[0]
        return args if forest is None else (args[0].index_select(1, forest.scored), *args[1:])

    def spread(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        forest = current[0]
        if forest is None:
            return output
        return output.new_zeros(1, forest.total, output.shape[-1]).index_copy(1, forest.scored, output)

    # Set by the layer's own arguments, which are the same again when checkpointing runs it a second time.
    layer.register_forward_pre_hook(enter, with_kwargs=True)
    layer.mlp.register_forward_pre_hook(select)
    layer.mlp.register_forward_hook(spread)
