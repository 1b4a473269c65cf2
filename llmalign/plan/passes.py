"""What a trainer's step does with a text model, run on models without weights: forward, reference, backward.

Each pass is run twice on a few layers and extended to all of them, so that a model of any size takes a second or two.
Float32, or bfloat16 by autocast, is as the recipe has it; engines that hold the weights themselves in bfloat16
(DeepSpeed) or compute with such ones (FSDP2) are run without autocast.
"""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from llmalign.errors import UserError
from llmalign.plan.outline import TextOutline, checkpointed, decoder_layers
from llmalign.plan.rows import Lengths
from llmalign.plan.trace import LOSS, REFERENCE, Ledger, Peak, extended, largest, traced, weightless, without_numbers
from llmalign.scores.prefix import Forest
from llmalign.scores.scoring import PADDED, Scorer
from llmalign.trainers.fused_head import add_trl_head

CPU = torch.device("cpu")
OURS, SFT, DPO, SCORER = ("scores", "sft", "dpo", "scorer")


class Unbroken(Forest):
    """A forest whose pieces go through attention whole, as on a GPU: the same bytes as block by block, and sooner."""

    def blocks(self, length: int) -> list[int]:
        """The piece itself."""
        return [length] if length else []

    def mask(self, queries: int, keys: int, dtype: torch.dtype) -> None:
        """Inside the kernel."""


@dataclass(frozen=True)
class Pass:
    """One kind of pass. `gradients`: there are some already; `engine`: weights in bfloat16 and no autocast."""

    batch: Lengths
    kind: str = PADDED
    backward: bool = True
    reference: bool = False
    checkpointing: bool = False
    bf16: bool = False
    engine: bool = False
    gradients: bool = False


@dataclass
class Passes:
    """The passes of one method over one model; what was traced once is kept."""

    outline: TextOutline
    step: str = OURS
    temperature: float = 1.0
    multiple_of: int | None = None
    pad: int = 0
    _known: dict[Any, Peak] = field(default_factory=dict)

    def scorer(self, requested: str) -> Scorer:
        """The scorer that a trainer would make for the model; its layout is the one that it begins with."""
        scorer = Scorer(
            requested, pad_token_id=self.pad, pad_to_multiple_of=self.multiple_of, temperature=self.temperature
        )
        scorer.choose(self.outline.config)
        return scorer

    def peak(self, what: Pass) -> Peak:
        """Bytes beside the weights at the worst moment. Raises UserError for a model that cannot be traced."""
        batch = what.batch if what.kind == PADDED else what.batch.merged()
        what = replace(what, batch=batch)
        key = (batch.prompts.tobytes(), batch.completions.tobytes(), batch.counts.tobytes(), *_flags(what))
        if key not in self._known:
            try:
                self._known[key] = self._traced(what)
            except (RuntimeError, NotImplementedError) as error:  # of an operation that needs numbers
                first = str(error).strip().split("\n")[0][:200].rstrip(".")
                raise UserError(
                    f"a pass of {self.outline.config.model_type} cannot be told without numbers ({first})"
                ) from error
        return self._known[key]

    def _traced(self, what: Pass) -> Peak:
        layers, period = self.outline.layers, self.outline.period
        if not what.backward:
            return largest(list(self.phases(what, min(3 * period, layers)).values()))
        if layers <= 4 * period:
            return largest(list(self.phases(what, layers).values()))
        few, more = 3 * period, 4 * period  # fewer have no layer between others
        whole = few + (layers - few) // period * period
        peak = extended(self.phases(what, few), self.phases(what, more), (few, more), whole)
        return peak * (layers / whole)

    def phases(self, what: Pass, layers: int) -> dict[str, Peak]:
        """Peaks by phase with so many layers."""
        dtype = torch.bfloat16 if what.engine and what.bf16 else None
        model = self.outline.build(layers, dtype=dtype)  # not below: what PEFT does to fake weights fails
        with without_numbers():
            return self._run(weightless(model), what)

    def _run(self, model: Any, what: Pass) -> dict[str, Peak]:
        scorer = self.scorer(what.kind)
        language_model = model.get_base_model() if isinstance(model, PeftModel) else model
        if self.step == OURS:
            scorer.attach(model)
        elif self.step in (SFT, DPO):
            add_trl_head(language_model)
        if what.checkpointing:
            checkpointed(model)
        forward = self._forward(model, scorer, what)
        autocast = what.bf16 and not what.engine

        def step(ledger: Ledger) -> None:
            with torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext():
                with nullcontext() if what.backward else torch.no_grad():
                    score = forward()
                if what.reference:
                    ledger.enter(REFERENCE)
                    off = model.disable_adapter() if isinstance(model, PeftModel) else nullcontext()
                    with torch.no_grad(), off:
                        forward()
            if what.backward:
                ledger.enter(LOSS)
                score.float().sum().backward()

        return traced(
            model,
            step,
            layers=decoder_layers(model, int(language_model.config.num_hidden_layers)),
            vocabulary=self.outline.vocabulary,
            gradients=what.gradients,
        )

    def _forward(self, model: nn.Module, scorer: Scorer, what: Pass) -> Callable[[], Tensor]:
        if self.step == OURS:
            layout = scorer.lay_out(what.batch.groups(), CPU)
            forest = layout.inputs.get("branches")
            if forest is not None:
                layout.inputs["branches"] = Unbroken(forest.trees, forest.device)
            return lambda: scorer.score(model, layout)
        ids = torch.zeros((len(what.batch.whole()), int(what.batch.whole().max())), dtype=torch.long)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}
        if self.step == SCORER:
            return lambda: model(**inputs).logits
        return lambda: model(**inputs, labels=ids, fused_lm_head=True).log_probs


def _flags(what: Pass) -> tuple[Any, ...]:
    return tuple(value for name, value in vars(what).items() if name != "batch")
