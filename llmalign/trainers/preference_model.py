"""Trains a pair-preference model, a classifier that reads both answers, on TRL's RewardTrainer."""

import logging
from dataclasses import dataclass, field
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from llmalign.errors import UserError
from llmalign.rewards.pair_model import PairText, mark_pair_preference
from llmalign.trainers.baselines import RewardTrainer
from llmalign.trainers.configs import RewardConfig
from llmalign.trainers.loading import load_tokenizer, set_eos_token
from llmalign.trainers.validation import refuse_inherited

logger = logging.getLogger(__name__)

_NOT_HONOURED = {
    "center_rewards_coefficient": "log-odds of a pair have no level to centre",
    "chat_template_path": "pairs are written as plain text, not by a chat template",
    "pad_token": "set tokenizer.pad_token",
}


@dataclass
class PreferenceModelConfig(RewardConfig):
    """RewardConfig for a pair-preference model; `max_length` bounds prompt with both answers: longer texts are cut."""

    max_length: int | None = field(
        default=2048,
        metadata={"help": "Tokens of prompt, both answers and markers; longer texts are cut, and counted."},
    )

    def __post_init__(self) -> None:
        refuse_inherited(self, _NOT_HONOURED)
        super().__post_init__()


class PreferenceModelTrainer(RewardTrainer):
    """RewardTrainer on pairs of answers read together, with the cross-entropy of which is better, in both orders.

    Rows have `prompt`, `chosen` and `rejected`. With s the logit that the first answer is better, a pair's loss is
    ``(softplus(-s(x, chosen, rejected)) + softplus(s(x, rejected, chosen))) / 2``. TRL's `accuracy` is then that of
    the symmetrised model, `margin` twice its log-odds, and `mean_reward` the model's preference for the first place.
    """

    def __init__(
        self, model: Any, args: PreferenceModelConfig, train_dataset: Any, eval_dataset: Any = None, **kwargs: Any
    ) -> None:
        tokenizer = kwargs.get("processing_class")
        if tokenizer is None:
            tokenizer = load_tokenizer(model if isinstance(model, str) else model.config._name_or_path)
        if not isinstance(tokenizer, PreTrainedTokenizerBase):
            raise UserError("vision-language models are not supported: pass a text model and its tokenizer")
        set_eos_token(tokenizer, args.eos_token)
        self._pairs_as = (tokenizer, args)
        kwargs["processing_class"] = tokenizer
        super().__init__(
            model=model,
            args=args,
            train_dataset=self._both_orders(train_dataset, "train"),
            eval_dataset=self._evaluation_sets(eval_dataset),
            **kwargs,
        )
        mark_pair_preference(self.model.config)

    def evaluate(self, eval_dataset: Any = None, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Evaluate, on rows of pairs where they are given."""
        return super().evaluate(self._evaluation_sets(eval_dataset), *args, **kwargs)

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Cross-entropy of both orders; TRL's metrics are kept, its Bradley-Terry loss is not."""
        _, outputs = super().compute_loss(model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch)
        loss = self.watched(pair_loss(outputs.logits.squeeze(-1)))
        return (loss, outputs) if return_outputs else loss

    def _evaluation_sets(self, sets: Any) -> Any:
        if isinstance(sets, dict):
            return {name: self._both_orders(rows, name) for name, rows in sets.items()}
        return sets if sets is None or isinstance(sets, str) else self._both_orders(sets, "eval")

    def _both_orders(self, rows: Dataset | IterableDataset, name: str) -> Dataset | IterableDataset:
        """`chosen_ids`: the chosen answer first; `rejected_ids`: the rejected one. TRL takes both as they are."""
        if "chosen_ids" in next(iter(rows)):
            return rows
        tokenizer, args = self._pairs_as
        whole = isinstance(rows, Dataset)
        options: dict[str, Any] = (
            {"num_proc": args.dataset_num_proc, "desc": f"Writing pairs of {name}"} if whole else {}
        )
        made = rows.map(_write, fn_kwargs={"text": PairText(tokenizer, args.max_length)}, **options)
        if whole:
            cut = sum(made["cut"])
            logger.info("%s: %d of %d pairs are cut to max_length %s.", name, cut, len(made), args.max_length)
        return made.remove_columns("cut")


def pair_loss(logits: Tensor) -> Tensor:
    """Mean cross-entropy of (2B,) logits: the first half has the better answer first, the second half has it second."""
    better_first, better_second = torch.chunk(logits, 2)
    return (nn.functional.softplus(-better_first) + nn.functional.softplus(better_second)).mean() / 2


def _write(row: dict[str, Any], text: PairText) -> dict[str, Any]:
    if row.get("prompt") is None:
        raise UserError(
            "a preference model needs rows with a prompt; prepare them with llmalign.trainers.prepare_pairs"
        )
    before = text.cut
    prompt, chosen, rejected = row["prompt"], row["chosen"], row["rejected"]
    orders = {"chosen_ids": text.ids(prompt, chosen, rejected), "rejected_ids": text.ids(prompt, rejected, chosen)}
    return {**orders, "cut": text.cut > before}
