"""A model small enough that every completion it can draw is listed, and f-DPG trainers on it."""

import copy
import math
from itertools import product

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from llmalign import losses
from llmalign.trainers.fdpg import FDPGTrainer
from llmalign.trainers.fdpg_config import FDPGConfig

# A space of 31 completions: the end at once, or one of five tokens and then one of six, with which it is cut.
END, WORDS = 1, 6
SPACE = [[END], *([first, second] for first, second in product(range(WORDS), repeat=2) if first != END)]
PROMPT = [2, 3]
WANTED = 4


def small_tokenizer():
    raw = Tokenizer(models.WordLevel({f"w{i}": i for i in range(WORDS)}, unk_token="w0"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="w0", eos_token="w1", unk_token="w0")


def small_model(seed=0):
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=WORDS, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=16, pad_token_id=0, eos_token_id=1, bos_token_id=None, initializer_range=0.5,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def has_wanted(prompts, completions, completion_ids, **columns):
    return [float(WANTED in ids) for ids in completion_ids]


def starts_low(prompts, completions, completion_ids, **columns):
    return [float(ids[0] < 3) for ids in completion_ids]


class WholeSpace(FDPGTrainer):
    """Draws every completion once."""

    def _generate_single_turn(self, prompt_ids, images, multimodal_fields):
        return [list(own) for own in SPACE]


def small_trainer(folder, reward=has_wanted, trainer=WholeSpace, model=None, rows=1, **options):
    given = {
        "num_generations": len(SPACE), "per_device_train_batch_size": len(SPACE), "max_completion_length": 2,
        "scoring": "padded", "max_steps": 1, "save_strategy": "no", "report_to": "none", "disable_tqdm": True,
        "logging_steps": 1,
    }  # fmt: skip
    return trainer(
        model or small_model(),
        reward,
        FDPGConfig(output_dir=str(folder), use_cpu=True, **(given | options)),
        train_dataset=Dataset.from_list([{"prompt": "w2 w3"}] * rows),
        processing_class=small_tokenizer(),
    )


def all_logps(model):
    """Log-probs (31,) of the whole space, from full logits in the model's own precision."""
    rows = []
    for completion in SPACE:
        logits = model(input_ids=torch.tensor([PROMPT + completion])).logits[0]
        logps = torch.log_softmax(logits[len(PROMPT) - 1 : -1], dim=-1)
        rows.append(logps[torch.arange(len(completion)), torch.tensor(completion)].sum())
    return torch.stack(rows)


def perturbed(model, seed=1, size=0.1):
    other = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in other.parameters():
            weight.add_(size * torch.randn(weight.shape, generator=generator))
    return other


def divergence_of(model, log_p, divergence):
    with torch.no_grad():
        return float(losses.exact_divergence(all_logps(model), log_p, divergence))


def log_target(base, kind, floor=None):
    satisfied = torch.tensor([WANTED in completion for completion in SPACE])
    if kind == "pointwise":
        outside = -torch.inf if floor is None else math.log(floor)
        return base + torch.where(satisfied, 0.0, outside)
    return base + satisfied.double() / 0.5
