"""Log-probs of a run's rows, worked out without the loop."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from llmalign.scores.text import sequence_logps


def loaded(folder: Path | str) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def scored(model: Any, rows: list[dict], names: tuple[str, ...] = ("chosen_ids", "rejected_ids")) -> torch.Tensor:
    """Log-probs (rows, names), computed one by one."""
    sequences = [(row["prompt_ids"], row[name]) for row in rows for name in names]
    return sequence_logps(model, sequences, pad_token_id=0, batch_size=1).reshape(len(rows), -1)


def columns(rows: list[dict], name: str) -> torch.Tensor:
    return torch.tensor([[row[f"{name}_{side}_logps"] for side in ("chosen", "rejected")] for row in rows])


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
