"""What is settled about data and options before a trainer of scores is built."""

import logging
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from trl import ModelConfig

from llmalign.data.rows import has_columns
from llmalign.errors import UserError

logger = logging.getLogger(__name__)


def brings_references(train: Any, evaluation: Any, columns: tuple[str, ...]) -> bool:
    """Whether the rows bring their reference log-probs, in these columns; all data sets must agree."""
    sets = [train, *(evaluation.values() if isinstance(evaluation, dict) else [evaluation])]
    found = [has_columns(rows, *columns) for rows in sets if rows is not None]
    if any(found) and not all(found):
        raise UserError(f"{' and '.join(columns)} must be in every data set, or in none")
    return all(found)


def refuse_adapter_dropout(peft_config: Any) -> None:
    """All dropout is off while scoring; an explicit dropout of the adapter would be ignored in silence."""
    if not isinstance(peft_config, LoraConfig) or peft_config.lora_dropout == 0:
        return
    if peft_config.lora_dropout != ModelConfig.lora_dropout:
        raise UserError(
            f"lora_dropout={peft_config.lora_dropout} is not honoured: dropout makes policy and reference differ; "
            "set lora_dropout: 0"
        )
    logger.info("TRL's default lora_dropout of %g is switched off.", peft_config.lora_dropout)


def best_of_first_set(args: Any, eval_dataset: Any) -> None:
    """Metrics of several evaluation sets carry the set's name, so a metric without one means the first."""
    if isinstance(eval_dataset, dict) and args.metric_for_best_model in ("rewards/accuracies", "reward", "js"):
        args.metric_for_best_model = f"eval_{next(iter(eval_dataset))}_{args.metric_for_best_model}"
        logger.info("The best checkpoint is picked by %s.", args.metric_for_best_model)


def refuse_short_data(args: Any, train_dataset: Any) -> None:
    """Raise UserError where a data set has fewer prompts than a rollout: its sampler gives whole rollouts alone."""
    needed = args.generation_batch_size // args.num_generations
    if isinstance(train_dataset, Dataset) and len(train_dataset) < needed:
        raise UserError(
            f"a rollout takes {needed} prompts and the training data has {len(train_dataset)}: lower "
            "per_device_train_batch_size or steps_per_generation, or give more prompts"
        )


#: what a model's own generation config may set that changes what is drawn, and the values at which it does not
_NEUTRAL = {
    "min_p": (None, 0.0), "typical_p": (None, 1.0), "epsilon_cutoff": (None, 0.0), "eta_cutoff": (None, 0.0),
    "no_repeat_ngram_size": (None, 0), "suppress_tokens": (None, []), "begin_suppress_tokens": (None, []),
    "bad_words_ids": (None, []), "sequence_bias": (None,), "exponential_decay_length_penalty": (None,),
    "guidance_scale": (None, 1.0), "forced_eos_token_id": (None,), "min_length": (None, 0), "min_new_tokens": (None, 0),
}  # fmt: skip


def check_sampling(model: Any, args: Any) -> None:
    """Raise UserError where a model's generation config would change what is drawn and not how it is scored.

    What the recipe sets itself (`min_p`, `generation_kwargs`) is the user's choice. Also refused: continuous batching
    of float32 weights, which it casts.
    """
    known = model.generation_config.to_dict()
    own = {name for name in _NEUTRAL if name in (args.generation_kwargs or {})}
    own |= {"min_p"} if args.min_p is not None else set()
    changed = [name for name, neutral in _NEUTRAL.items() if name not in own and known.get(name) not in neutral]
    if changed:
        raise UserError(
            f"the model's generation_config sets {changed[0]}={known[changed[0]]!r}, so that completions would be "
            "drawn from another distribution than they are scored in; take it out of generation_config.json, or set it "
            "in the recipe under generation_kwargs"
        )
    if args.use_transformers_continuous_batching and model.dtype == torch.float32:
        raise UserError(
            "use_transformers_continuous_batching is refused with float32 weights: it casts the weights that are "
            "trained; leave it off, or use vLLM"
        )
