"""Trainers whose loss compares two responses to a prompt; each says what it changes and no more."""

import json
import logging
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from datasets import Dataset
from datasets.fingerprint import Hasher
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from llmalign import losses
from llmalign.data.label_noise import estimate_flip_rate
from llmalign.errors import UserError
from llmalign.scores.sampling import sample_completions
from llmalign.trainers._trl import PairBase, continue_adapter, load_frozen
from llmalign.trainers.configs import INPOConfig, RDPOConfig, RPOConfig
from llmalign.trainers.pair_loss import PairLoss
from llmalign.trainers.preparation import prepare_pairs
from llmalign.trainers.text_scores import text_metrics
from llmalign.types import PairScores

logger = logging.getLogger(__name__)

_LAST = "ref"  # the name under which TRL keeps a frozen copy of an adapter that goes on being trained
_LAST_COLUMNS = ("last_chosen_logps", "last_rejected_logps")
_LAST_SOURCES = {
    "columns": "the columns last_chosen_logps and last_rejected_logps",
    "model": "last_model_name_or_path",
    "adapter": "a frozen copy of the adapter that training goes on from",
    "start": "a frozen copy of the model that training starts from",
    "reference": "the reference, as in the first iteration",
}


class PreferenceBase(PairBase):
    """Trains on rows of a prompt, a chosen and a rejected response."""

    prepare = staticmethod(prepare_pairs)

    def row_metrics(self, scores: PairScores, inputs: dict[str, Any]) -> dict[str, Tensor]:
        """Those of pairs, with log-probs, drift in nats and what length has to do with it."""
        metrics = super().row_metrics(scores, inputs)
        return metrics | text_metrics(scores, metrics["rewards/accuracies"])


class PairTrainer(PairLoss, PreferenceBase):
    """Trains with any pairwise loss of `llmalign.losses` that needs policy and reference alone (`args.loss`)."""

    _name = "Pair"
    _tag_names = ["llmalign"]


class RPOTrainer(PreferenceBase):
    """DPO plus `-eta*beta*log pi(base | prompt)`, with the base response chosen by `args.base` (arXiv 2405.16436).

    `base="reference"` draws one response a prompt from the reference before training and keeps it in
    `base_responses.json` under the output folder, so that a resumed run trains on the same ones.
    """

    _name = "RPO"
    _tag_names = ["llmalign", "rpo"]

    def __init__(self, model: Any, ref_model: Any = None, args: RPOConfig | None = None, **kwargs: Any) -> None:
        super().__init__(model, ref_model, args, **kwargs)
        if self.args.base == "reference":
            self.map_sets(self._with_base_samples)

    def scores(self, model: nn.Module, inputs: dict[str, Any]) -> PairScores:
        """Pair scores, with the policy's log-prob of the base response where that is not the chosen one."""
        scores = super().scores(model, inputs)
        if self.args.base != "chosen" and scores.base is None:
            raise UserError(f"base: {self.args.base} needs a base response in every row: add a column named base")
        return scores

    def loss_terms(self, scores: PairScores, inputs: dict[str, Any]) -> dict[str, Tensor]:
        """The preference term and the base term, logged apart."""
        preference = losses.dpo(scores, beta=self.args.beta)
        return {
            "preference": preference,
            "base": losses.rpo(scores, beta=self.args.beta, eta=self.args.eta) - preference,
        }

    @property
    def reward_scale(self) -> float:
        """beta."""
        return self.args.beta

    def _with_base_samples(self, dataset: Any, name: str) -> Dataset:
        if not isinstance(dataset, Dataset):
            raise UserError("base: reference cannot draw from a stream; draw first and give a base column")
        if self.is_deepspeed_enabled or self.is_fsdp_enabled:
            raise UserError("base: reference cannot draw from a sharded model; draw first and give a base column")
        prompts = dataset["prompt_ids"]
        reference = self.args.ref_model_name_or_path or self.model.config._name_or_path
        key = Hasher.hash((list(prompts), self.args.seed, self.args.base_new_tokens, reference))
        path = Path(self.args.output_dir) / "base_responses.json"
        kept = json.loads(path.read_text()) if path.is_file() else {}
        if kept.get(name, {}).get("key") != key:
            kept[name] = {"key": key, "ids": self._draw(list(prompts), name)}
            if self.accelerator.is_main_process:
                path.parent.mkdir(parents=True, exist_ok=True)
                aside = path.with_suffix(".tmp")
                aside.write_text(json.dumps(kept))
                aside.replace(path)
            self.accelerator.wait_for_everyone()
        if "base_ids" in dataset.column_names:
            dataset = dataset.remove_columns("base_ids")
        return dataset.add_column("base_ids", kept[name]["ids"])

    def _draw(self, prompts: list[list[int]], name: str) -> list[list[int]]:
        """Each rank draws for its share of the prompts."""
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        model: PreTrainedModel = self.accelerator.unwrap_model(self.ref_model or self.model)
        logger.info("Drawing one base response for each of the %d prompts of %s.", len(prompts), name)
        own = sample_completions(
            model,
            self._tokenizer,
            prompts[rank::world],
            max_new_tokens=self.args.base_new_tokens,
            seed=self.args.seed + rank,
            batch_size=self.args.per_device_eval_batch_size,
        )
        parts = gather_object([own]) if world > 1 else [own]
        return [parts[i % world][i // world] for i in range(len(prompts))]


class RDPOTrainer(PreferenceBase):
    """DPO's loss made unbiased under labels that are flipped at `args.flip_rate` (arXiv 2403.00409).

    With `flip_rate="estimate"` the rate is fitted to an independent scorer's margins before training and said.
    """

    _name = "rDPO"
    _tag_names = ["llmalign", "rdpo"]

    def __init__(self, model: Any, ref_model: Any = None, args: RDPOConfig | None = None, **kwargs: Any) -> None:
        super().__init__(model, ref_model, args, **kwargs)
        self.flip_rate = self._estimate() if self.args.flip_rate == "estimate" else self.args.flip_rate

    def loss_terms(self, scores: PairScores, inputs: dict[str, Any]) -> dict[str, Tensor]:
        """The noise-corrected loss, which goes below zero."""
        return {"rdpo": losses.rdpo(scores, beta=self.args.beta, flip_rate=self.flip_rate)}

    @property
    def reward_scale(self) -> float:
        """beta."""
        return self.args.beta

    def _estimate(self) -> float:
        column = self.args.scorer_margin_column
        if not isinstance(self.train_dataset, Dataset) or column not in self.train_dataset.column_names:
            raise UserError(f"flip_rate: estimate found no column {column!r} with the scorer's margins")
        estimate = estimate_flip_rate(list(self.train_dataset[column]))
        logger.info(
            "flip_rate estimated from %s: %.3f, 95 %% interval [%.3f, %.3f].",
            column, estimate.rate, estimate.low, estimate.high,
        )  # fmt: skip
        return estimate.rate


class INPOTrainer(PreferenceBase):
    """One INPO iteration: squared loss on sums against the reference and the previous iterate (arXiv 2407.00617).

    The previous iterate is, in this order: columns `last_chosen_logps` and `last_rejected_logps`;
    `last_model_name_or_path`; `last_adapter`, from which the policy then also starts; else the model that training
    starts from. The reference is `ref_model`, `ref_model_name_or_path`, the model with its adapter off, or the start.
    """

    _name = "INPO"
    _tag_names = ["llmalign", "inpo"]

    def __init__(self, model: Any, ref_model: Any = None, args: INPOConfig | None = None, **kwargs: Any) -> None:
        if args is not None and args.last_adapter is not None:
            model = continue_adapter(model, args.last_adapter, args, kwargs.pop("quantization_config", None))
            kwargs["peft_config"] = None
        goes_on = isinstance(model, PeftModel)
        super().__init__(model, ref_model, args, **kwargs)
        self.last_model: nn.Module | None = None
        self.last_source = self._find_last(goes_on)
        if self.last_source != "reference":
            elsewhere = self.last_source in ("columns", "model")
            self.start_may_differ = f"the previous iterate comes from its {self.last_source}" if elsewhere else None
        logger.info("INPO: the previous iterate is taken from %s.", _LAST_SOURCES[self.last_source])
        if self.precompute_ref_logps and self.last_source in ("model", "adapter", "start"):
            self.map_sets(self._with_last)

    def _with_last(self, dataset: Any, name: str) -> Any:
        model = self.model if self.last_model is None else self.last_model
        return self.with_logps(dataset, name, model, self._last_adapter, _LAST_COLUMNS)

    @property
    def _last_adapter(self) -> str | None:
        return _LAST if self.last_source == "adapter" else None

    def _find_last(self, goes_on: bool) -> str:
        if set(_LAST_COLUMNS) <= set(next(iter(self.train_dataset))):
            return "columns"
        if self.args.last_model_name_or_path is not None:
            self.last_model = self.freeze(load_frozen(self.args.last_model_name_or_path, self.args))
            return "model"
        if goes_on:
            if _LAST not in self.model.peft_config:  # TRL keeps a copy only where no other reference is given
                self.freeze_adapter(_LAST)
            return "adapter"
        if not self.explicit_reference:
            return "reference"
        if not isinstance(self.model, PeftModel):
            start = self.model.config._name_or_path
            self.last_model = self.freeze(load_frozen(start, self.args) if start else deepcopy(self.model))
        return "start"

    def scores(self, model: nn.Module, inputs: dict[str, Any]) -> PairScores:
        """Pair scores with those of the previous iterate."""
        scores = super().scores(model, inputs)
        if self.last_source == "reference":
            return replace(scores, last_chosen=scores.ref_chosen, last_rejected=scores.ref_rejected)
        last = self._last_logps(inputs)
        return replace(scores, last_chosen=last[:, 0], last_rejected=last[:, 1])

    def _last_logps(self, inputs: dict[str, Any]) -> Tensor:
        """Log-probs (B, 2) under the previous iterate: its columns, else the frozen model or adapter."""
        if _LAST_COLUMNS[0] in inputs:
            known = torch.stack([inputs[column].float() for column in _LAST_COLUMNS], dim=1)
            if self.last_source == "columns" or not self._streams or known.isfinite().all():
                return known
        model = self.model if self.last_model is None else self.last_model
        return self.frozen_logps(model, self.referred(inputs["groups"]), self._last_adapter).reshape(-1, 2)

    @property
    def reference_adapter(self) -> None:
        """None: the adapter that TRL would take for the reference is the previous iterate here."""
        return None

    def start_gap(self, scores: PairScores) -> Tensor:
        """INPO starts from the previous iterate, not from the reference."""
        assert scores.last_chosen is not None and scores.last_rejected is not None
        chosen, rejected = scores.chosen - scores.last_chosen, scores.rejected - scores.last_rejected
        return chosen.abs().maximum(rejected.abs()).detach()

    def loss_terms(self, scores: PairScores, inputs: dict[str, Any]) -> dict[str, Tensor]:
        """The squared loss, one term."""
        return {"inpo": losses.inpo(scores, eta=self.args.eta, tau=self.args.tau)}

    @property
    def reward_scale(self) -> float:
        """tau, the strength of the reference (eta where tau is zero)."""
        return self.args.tau or self.args.eta
