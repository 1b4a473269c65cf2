"""A fresh process of the bench: `python model.py JOB.json` writes the model with random weights that all load."""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch  # noqa: E402
import transformers  # noqa: E402
from tokenizers import Tokenizer, models, pre_tokenizers  # noqa: E402
from transformers import PreTrainedTokenizerFast  # noqa: E402

from benching import cases  # noqa: E402


def build_tokenizer(vocabulary: int) -> PreTrainedTokenizerFast:
    """One word, one token: texts of an exact length are easy to write."""
    words = [*cases.SPECIAL, *(f"w{index}" for index in range(vocabulary - len(cases.SPECIAL)))]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")


def save_model(job: cases.Job) -> None:
    """Write a model with random weights and its tokenizer, for all contenders to load."""
    shape = job.get_case().shape
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(
        shape.family,
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        max_position_embeddings=cases.MAX_LENGTH,
        tie_word_embeddings=shape.family == "qwen2",
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
    )
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=getattr(torch, job.dtype))
    model.save_pretrained(job.model)
    build_tokenizer(shape.vocabulary).save_pretrained(job.model)


if __name__ == "__main__":
    save_model(cases.Job(**json.loads(Path(sys.argv[1]).read_text())))
