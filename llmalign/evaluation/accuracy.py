"""Preference accuracy: how often a model puts the preferred answer of a held-out pair above the other."""

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from llmalign.data.collators import PairCollator
from llmalign.evaluation.winrate import Estimate, bootstrap_mean
from llmalign.scores.scoring import AUTO, PADDED, Scorer

TOKENS_PER_BATCH = 16_384
CHECKED = 4  # prompts on which the layout is compared with the padded one
LIMIT = 1e-4  # nats a sequence, in float32

Progress = Callable[[Iterable[list[int]]], Iterable[list[int]]]


def pair_accuracy(
    rows: Sequence[dict[str, Any]],
    margins: Sequence[float],
    reference_margins: Sequence[float] | None = None,
) -> Estimate:
    """Share of B pairs with log pi(chosen) - log pi(rejected) above the reference's, a tie counting one half.

    `margins` and `reference_margins` (B,) in nats are those of `pair_margins`; without a reference the policy's own
    margin is compared with 0. The 95 % interval draws whole prompts, because pairs that share one are not independent.
    Raises ValueError for no pair, and for lengths that differ.
    """
    others = [0.0] * len(margins) if reference_margins is None else reference_margins
    right = [float(own > other) + 0.5 * (own == other) for own, other in zip(margins, others, strict=True)]
    return bootstrap_mean(right, [tuple(row["prompt_ids"]) for row in rows])


@torch.no_grad()
def pair_margins(
    model: Any,
    rows: Sequence[dict[str, Any]],
    *,
    pad_token_id: int,
    max_length: int | None = None,
    adapter_off: bool = False,
    progress: Progress | None = None,
) -> list[float]:
    """log pi(chosen) - log pi(rejected) of B prepared pairs (`prompt_ids`, `chosen_ids`, `rejected_ids`), in nats.

    Sums over the completions, their end token included, each prompt read once for both. `adapter_off` scores the base
    that an adapter was put on. `progress` wraps the batches. Raises UserError naming a row whose prompt alone fills
    `max_length`. Not covered: models split over several processes.
    """
    groups = PairCollator(max_length=max_length).groups(list(rows)).first(2)  # RPO's rows have a third completion
    scorer = Scorer(AUTO, pad_token_id=pad_token_id)
    scorer.choose(model.config)
    scorer.attach(model)
    off: AbstractContextManager[Any] = model.disable_adapter() if adapter_off else nullcontext()
    margins = [0.0] * len(groups)
    with off:
        if scorer.kind != PADDED:
            first = groups.take(list(range(min(CHECKED, len(groups)))))
            exact = model.dtype == torch.float32
            scorer.settle(scorer.gaps(model, first, device=model.device, exact=exact, limit=LIMIT))
        batches: Iterable[list[int]] = list(groups.batches(TOKENS_PER_BATCH))
        for batch in progress(batches) if progress is not None else batches:
            logps = scorer.logps(model, groups.take(batch), device=model.device).double().tolist()
            for place, row in enumerate(batch):
                margins[row] = logps[2 * place] - logps[2 * place + 1]
    return margins
