"""The tokenizer and the Llama of the embedded world, built here from its own text; nothing is downloaded."""

import random
from functools import cache

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from llmalign.embedded.answers import compose
from llmalign.embedded.grammar import prompts

START, END, PAD = "<|start|>", "<|end|>", "<|pad|>"
MAX_LENGTH = 512
VOCABULARY = 2000

# A user's turn ends with a line break and an assistant's with the end of text, so that a conversation of one turn has
# the very tokens of the plain rows, and the rendered prompt is a prefix of the rendered whole.
CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'assistant' -%}"
    "{%- generation -%}{{- message['content'] + eos_token -}}{%- endgeneration -%}"
    "{%- else -%}{{- message['content'] | trim + '\n' -}}{%- endif -%}"
    "{%- endfor -%}"
)


@cache
def _trained_bpe() -> str:
    """The byte-level BPE as JSON, trained on every prompt and on 6,000 answers."""
    rng = random.Random("tokenizer")
    texts = [prompt.text for prompt in prompts()]
    texts += [compose(prompt, rng) for prompt in rng.choices(prompts(), k=6000)]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[PAD, END, START],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer.to_str()


def build_tokenizer(*, bos: bool = False) -> PreTrainedTokenizerFast:
    """The world's byte-level BPE tokenizer, with a chat template and a padding token of its own.

    With `bos` every text starts with a begin-of-text token. No end-of-text token is added to plain text: that is left
    to whoever prepares the data.
    """
    tokenizer = Tokenizer.from_str(_trained_bpe())
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{START} $A",
            pair=f"{START} $A {START} $B:1",
            special_tokens=[(START, tokenizer.token_to_id(START))],
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END,
        pad_token=PAD,
        bos_token=START if bos else None,
        chat_template=("{{- bos_token -}}" if bos else "") + CHAT_TEMPLATE,
        model_max_length=MAX_LENGTH,
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
    )


def tiny_config(tokenizer: PreTrainedTokenizerFast) -> LlamaConfig:
    """The shape of the embedded model: 2 layers of width 128, tied embeddings, about .7 million parameters.

    Weights start at .06: at the usual .02 a model this narrow hardly learns to copy words from its prompt.
    """
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=MAX_LENGTH,
        initializer_range=0.06,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def build_model(
    tokenizer: PreTrainedTokenizerFast, *, seed: int = 0, config: LlamaConfig | None = None
) -> LlamaForCausalLM:
    """A fresh float32 Llama with weights drawn from `seed`; the caller's random state is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config or tiny_config(tokenizer))
    model.generation_config = GenerationConfig(
        do_sample=True,
        max_new_tokens=128,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return model
