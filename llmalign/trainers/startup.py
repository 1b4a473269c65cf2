"""What is settled about data and options before a trainer of scores is built."""

import logging
from typing import Any

from peft import LoraConfig
from trl import ModelConfig

from llmalign.data.rows import has_columns
from llmalign.errors import UserError

logger = logging.getLogger(__name__)


def brings_references(train: Any, evaluation: Any) -> bool:
    """Whether the rows bring their reference log-probs; all data sets must agree."""
    sets = [train, *(evaluation.values() if isinstance(evaluation, dict) else [evaluation])]
    found = [has_columns(rows, "ref_chosen_logps", "ref_rejected_logps") for rows in sets if rows is not None]
    if any(found) and not all(found):
        raise UserError("ref_chosen_logps and ref_rejected_logps must be in every data set, or in none")
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
    if isinstance(eval_dataset, dict) and args.metric_for_best_model == "rewards/accuracies":
        args.metric_for_best_model = f"eval_{next(iter(eval_dataset))}_rewards/accuracies"
        logger.info("The best checkpoint is picked by %s.", args.metric_for_best_model)
