"""Trainers on a tiny model, and the log-probs of their batches computed without them."""

import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM

from llmalign.scores import sequence_logps
from tests.trainers import tiny

LORA = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
COMMON = {
    "per_device_train_batch_size": 4, "learning_rate": 1e-3, "max_steps": 2, "save_strategy": "no",
    "logging_steps": 1, "report_to": "none", "disable_tqdm": True, "max_length": 96, "alarm_prompts": 0,
    "precompute_ref_log_probs": False,
}  # fmt: skip


def build(trainer, config, model, folder, *, data=None, evaluation=None, peft=None, reference=None, **options):
    return trainer(
        model=model,
        ref_model=reference,
        args=config(output_dir=str(folder), **(COMMON | options)),
        train_dataset=data if data is not None else tiny.pairs(8),
        eval_dataset=evaluation,
        processing_class=tiny.tokenizer(),
        peft_config=peft,
    )


def batch(trainer):
    return trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))


def independent(path, trainer, rows):
    """Chosen and rejected log-probs from full logits, one sequence at a time, with the rows' ids kept."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32) if isinstance(path, str) else path
    kept = {row["row_id"]: row for row in trainer.train_dataset}
    wanted = [kept[int(i)] for i in rows]
    return [
        sequence_logps(model, [(r["prompt_ids"], r[side]) for r in wanted], pad_token_id=0, batch_size=1)
        for side in ("chosen_ids", "rejected_ids")
    ]
