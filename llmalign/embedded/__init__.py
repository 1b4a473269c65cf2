"""A small closed world of instructions and answers whose ground truth is known, and a model of its own.

It needs no download: prompts, answers, preferences, tokenizer and model are all made here. The quickstart, the smoke
recipes (`embedded:tiny`) and the claims run on it.
"""

from llmalign.assets import cache_folder
from llmalign.embedded.answers import STYLES, Style, compose
from llmalign.embedded.grammar import Prompt, parse_prompt, prompts, read_sentence, split, split_sentences
from llmalign.embedded.model import build_model, build_tokenizer, tiny_config
from llmalign.embedded.rows import as_conversation, group_rows, pair_rows, sample_files, sft_rows, write_samples
from llmalign.embedded.tiny import build_tiny, ensure_tiny, speak
from llmalign.embedded.truth import Traits, broken_share, preference, proxy_score, score, traits

__all__ = [
    "STYLES",
    "Prompt",
    "Style",
    "Traits",
    "as_conversation",
    "broken_share",
    "build_model",
    "build_tiny",
    "build_tokenizer",
    "cache_folder",
    "compose",
    "ensure_tiny",
    "group_rows",
    "pair_rows",
    "parse_prompt",
    "preference",
    "prompts",
    "proxy_score",
    "read_sentence",
    "sample_files",
    "score",
    "sft_rows",
    "speak",
    "split",
    "split_sentences",
    "tiny_config",
    "traits",
    "write_samples",
]
