"""What the claims on a small language model share: token ids, scores and samples of the embedded world."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

from claims import start
from claims.cells import package_files
from llmalign.embedded.grammar import Prompt
from llmalign.embedded.model import build_tokenizer
from llmalign.scores.sampling import sample_completions
from llmalign.scores.text import sequence_logps

SOURCES = (
    *(Path(__file__).with_name(name) for name in ("start.py", "world.py")),
    *start.WORLD_FILES,
    *package_files("llmalign.losses"),
    *package_files("llmalign.scores"),
    *(path for path in package_files("llmalign.trainers") if path.stem in ("_trl", "configs", "pair", "preference")),
)


def load(folder: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A fresh float32 copy of the model in `folder`, and the world's tokenizer."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), build_tokenizer()


def prepared(rows: Sequence[dict[str, Any]], tokenizer: PreTrainedTokenizerBase) -> list[dict[str, Any]]:
    """Pairs of text as rows of token ids, end of text included, as the trainers take them."""

    def ids(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    end = [tokenizer.eos_token_id]
    return [
        {
            "row_id": number,
            "prompt_ids": ids(row["prompt"]),
            "chosen_ids": ids(row["chosen"]) + end,
            "rejected_ids": ids(row["rejected"]) + end,
            "flipped": row["flipped"],
        }
        for number, row in enumerate(rows)
    ]


def pair_logps(model: PreTrainedModel, rows: Sequence[dict[str, Any]]) -> tuple[Tensor, Tensor]:
    """Log-probs (N,) of the chosen and of the rejected responses of prepared rows."""
    sides = [(row["prompt_ids"], row[f"{side}_ids"]) for side in ("chosen", "rejected") for row in rows]
    chosen, rejected = sequence_logps(model, sides, pad_token_id=model.config.pad_token_id, batch_size=64).chunk(2)
    return chosen, rejected


def with_logps(model: PreTrainedModel, rows: Sequence[dict[str, Any]], name: str) -> list[dict[str, Any]]:
    """The rows with `<name>_chosen_logps` and `<name>_rejected_logps` under `model`: scored once, not at every pass."""
    chosen, rejected = pair_logps(model, rows)
    columns = zip(rows, chosen.tolist(), rejected.tolist(), strict=True)
    return [{**row, f"{name}_chosen_logps": c, f"{name}_rejected_logps": r} for row, c, r in columns]


def answers(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Prompt], *, tokens: int, seed: int
) -> list[list[int]]:
    """One answer of at most `tokens` tokens to each prompt, sampled at temperature 1."""
    ids = [tokenizer(prompt.text, add_special_tokens=False)["input_ids"] for prompt in prompts]
    return sample_completions(model, tokenizer, ids, max_new_tokens=tokens, seed=seed, batch_size=256)


class Watch(TrainerCallback):
    """Calls `look(model, step)` after every `every` steps."""

    def __init__(self, every: int, look: Callable[[Any, int], None]) -> None:
        self.every = every
        self.look = look

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step % self.every == 0:
            self.look(kwargs["model"], state.global_step)
