"""The plainest trainer under SafeCheckpointMixin, small enough to be run many times."""

from pathlib import Path

import torch
from torch.utils.data import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from llmalign.trainers.checkpoint import SafeCheckpointMixin


class Texts(Dataset):
    """Sixteen rows of eight token ids."""

    def __len__(self) -> int:
        return 16

    def __getitem__(self, row: int) -> dict[str, torch.Tensor]:
        ids = (torch.arange(8) * (row + 1)) % 31 + 1
        return {"input_ids": ids, "labels": ids}


class SafeTrainer(SafeCheckpointMixin, Trainer):
    """The plainest trainer under the mixin."""


def small_llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        attention_dropout=0.2,
        max_position_embeddings=16,
    )
    return LlamaForCausalLM(config)


def make(
    output_dir: Path, trainer_class: type[Trainer] = SafeTrainer, model=None, callbacks=None, **options
) -> Trainer:
    fields = {"max_steps": 6, "save_steps": 2, "per_device_train_batch_size": 2, "learning_rate": 1e-2, **options}
    args = TrainingArguments(
        output_dir=str(output_dir), use_cpu=True, report_to=[], disable_tqdm=True, logging_steps=1, **fields
    )
    model = small_llama() if model is None else model
    return trainer_class(model, args, train_dataset=Texts(), eval_dataset=Texts(), callbacks=callbacks)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())
