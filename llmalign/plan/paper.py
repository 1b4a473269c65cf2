"""Scaling on paper: how many GPUs for which model, and tokens a second, from the same formulas as a plan; as Markdown.

Nothing here was run on a GPU. Every number follows from the shapes and the assumptions that the page itself states.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from peft import LoraConfig
from tqdm.auto import tqdm  # type: ignore[import-untyped]
from transformers import AutoConfig

from llmalign.plan.memory import GB, head_logits, optimizer_state
from llmalign.plan.outline import FOUR_BIT, TextOutline, Weights
from llmalign.plan.passes import Pass, Passes
from llmalign.plan.rows import Lengths
from llmalign.plan.sharding import DDP, FSDP2, SHARDED, SINGLE, ZERO1, ZERO2, ZERO3, Device, Held, spread
from llmalign.plan.suggest import usable
from llmalign.plan.timing import H100, communication, operations, step_seconds, work_of
from llmalign.plan.trace import Peak
from llmalign.scores.scoring import SHARED_PROMPT

MEMORY = 80 * GB
PROMPT, ANSWER, ROWS = 2048, 2048, 1  # of a pair: tokens; pairs a device at a time
COUNTS = (1, 2, 4, 8, 16, 32, 64)
FULL, LORA, LORA_4BIT = WAYS = ("full", "LoRA", "LoRA, 4 bit")
RANK = 16


@dataclass(frozen=True)
class Shape:
    """A released model's decoder, by its config's numbers."""

    name: str
    like: str
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    feed_forward: int
    vocabulary: int
    family: str = "llama"
    tied: bool = False

    def outline(self, way: str) -> TextOutline:
        """The model without weights, trained one way."""
        config = AutoConfig.for_model(
            self.family,
            hidden_size=self.hidden,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            intermediate_size=self.feed_forward,
            vocab_size=self.vocabulary,
            tie_word_embeddings=self.tied,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        )
        config._attn_implementation = "sdpa"
        adapter = None if way == FULL else LoraConfig(r=RANK, lora_alpha=2 * RANK, task_type="CAUSAL_LM")
        dtype = torch.float32 if way == FULL else torch.bfloat16
        return TextOutline(self.name, config, dtype, adapter, FOUR_BIT if way == LORA_4BIT else None)


SHAPES = (
    Shape("0.5B", "Qwen2.5-0.5B", 896, 24, 14, 2, 4864, 151936, "qwen2", True),
    Shape("1.5B", "Qwen2.5-1.5B", 1536, 28, 12, 2, 8960, 151936, "qwen2", True),
    Shape("7B", "Llama-2-7B", 4096, 32, 32, 32, 11008, 32000),
    Shape("8B", "Llama-3.1-8B", 4096, 32, 32, 8, 14336, 128256),
    Shape("13B", "Llama-2-13B", 5120, 40, 40, 40, 13824, 32000),
    Shape("32B", "Qwen2.5-32B", 5120, 64, 40, 8, 27648, 152064, "qwen2"),
    Shape("70B", "Llama-3.1-70B", 8192, 80, 64, 8, 28672, 128256),
)  # fmt: skip


class Sized:
    """One model trained one way: its weights, and its passes on the page's batch."""

    def __init__(self, shape: Shape, way: str) -> None:
        self.shape, self.way = shape, way
        self.outline = shape.outline(way)
        self.weights: Weights = self.outline.weights()
        self.passes = Passes(self.outline)
        self.batch = Lengths.alike(ROWS, PROMPT, [ANSWER, ANSWER])
        self.state = optimizer_state("adamw_torch_fused", [(self.weights.trained,)]) or 0.0

    def peak(self, config: str) -> Peak:
        """Of a training pass with checkpointing, the reference looked up."""
        what = Pass(self.batch, SHARED_PROMPT, checkpointing=True, bf16=True, engine=config in SHARDED, gradients=True)
        found = self.passes.peak(what)
        logits = head_logits(int(self.batch.completions.sum()), self.shape.vocabulary)
        return Peak(found.activations, logits, found.gradients, found.copies)

    def device(self, config: str, count: int, *, reference: bool = False, peak: Peak | None = None) -> Device:
        """Parts on one of `count` GPUs; a full run's `reference` is a frozen copy in float32, as it is loaded."""
        frozen = {"reference": self.weights} if reference and self.way == FULL else {}
        held = Held(self.weights, self.state, True, frozen)
        return spread(config, count, held, self.peak(config) if peak is None else peak)

    def smallest(self, *, reference: bool = False) -> tuple[str, int, Device] | None:
        """The fewest GPUs that hold it, and the config that sends least; None beyond the largest number looked at."""
        for count in COUNTS:
            known = (SINGLE,) if count == 1 else (DDP, ZERO1, ZERO2, FSDP2, ZERO3)
            if self.way == LORA_4BIT and count > 1:
                known = (DDP,)  # quantized weights are not sharded here
            for config in known:
                if self.device(config, count, reference=reference, peak=Peak()).total > usable(MEMORY):
                    continue  # without any pass already
                device = self.device(config, count, reference=reference)
                if device.total <= usable(MEMORY):
                    return config, count, device
        return None


def gigabytes(count: float) -> str:
    """Bytes as GB."""
    return f"{count / GB:.1f}"


def how_many(shapes: tuple[Shape, ...] = SHAPES) -> Iterator[str]:
    """The table of GPUs, a line each."""
    columns = "weights | gradients | optimizer | passes | other"
    yield f"| model | numbers | trained | config | GPUs | {columns} | a GPU | with the reference beside it |"
    yield "|" + "---|" * 12
    for shape in tqdm(shapes, desc="how many GPUs", unit="model"):
        for way in WAYS:
            sized = Sized(shape, way)
            found = sized.smallest()
            numbers = f"{sized.weights.count / 1e9:.2f} B"
            if found is None:
                yield (
                    f"| {shape.name} | {sized.weights.count / 1e9:.2f} B | {way} | none | more than {COUNTS[-1]} |"
                    + " |" * 7
                )
                continue
            config, count, device = found
            parts = device.parts
            passes = parts["activations"] + parts["logits"]
            main = [parts[name] for name in ("weights", "gradients", "optimizer")]
            other = device.total - passes - sum(main)
            beside = sized.smallest(reference=True) if way == FULL else found
            words = f"{beside[1]} x {beside[0]}" if beside is not None else "none"
            sizes = " | ".join(map(gigabytes, (*main, passes, other, device.total)))
            yield f"| {shape.name} | {numbers} | {way} | {config} | {count} | {sizes} | {words} |"


def how_fast(names: tuple[str, ...] = ("7B", "70B"), counts: tuple[int, ...] = (8, 64, 512)) -> Iterator[str]:
    """The table of tokens a second under ZeRO-3, a line each."""
    yield "| model | trained | GPUs | computing | sending | tokens a second and GPU | tokens a second | memory a GPU |"
    yield "|" + "---|" * 8
    for name in tqdm(names, desc="how fast", unit="model"):
        for way in (FULL, LORA):
            sized = Sized(next(shape for shape in SHAPES if shape.name == name), way)
            for count in counts:
                yield _speed(sized, count)


def _speed(sized: Sized, count: int) -> str:
    shape, weights = sized.shape, sized.weights
    fed = float(sized.batch.sizes(SHARED_PROMPT).tokens.sum())
    done = operations(
        work_of(sized.batch, SHARED_PROMPT, fed),
        body=weights.count - weights.outside,
        head=shape.hidden * shape.vocabulary,
        width=shape.hidden * shape.layers,
        adapter=sized.way != FULL,
        checkpointing=True,
        frozen=0,
    )
    sent = communication(ZERO3, count, weights.count, weights.trained, 2, 0)
    low, high = step_seconds(done, sent, H100, count)
    computing = step_seconds(done, 0, H100, count)[0]
    each = (fed / high, fed / low)
    device = sized.device(ZERO3, count)
    fits = "" if device.total <= usable(MEMORY) else ", does not fit"
    return (
        f"| {shape.name} | {sized.way} | {count} | {computing:.2f} s | {high - computing:.2f} s | "
        f"{each[0]:,.0f} to {each[1]:,.0f} | {each[0] * count:,.0f} to {each[1] * count:,.0f} | "
        f"{gigabytes(device.total)} GB{fits} |"
    )


def shapes() -> Iterator[str]:
    """The shapes of the page, a line each."""
    yield "| model | shape of | hidden | layers | heads / of keys | feed-forward | vocabulary |"
    yield "|" + "---|" * 7
    for shape in SHAPES:
        yield (
            f"| {shape.name} | {shape.like} | {shape.hidden} | {shape.layers} | {shape.heads} / {shape.kv_heads} | "
            f"{shape.feed_forward} | {shape.vocabulary:,} |"
        )


def page() -> str:
    """The whole page."""
    tokens = PROMPT + 2 * (ANSWER - 1)
    told = {
        "prompt": PROMPT, "answer": ANSWER, "rows": ROWS, "tokens": tokens, "rank": RANK, "gpu": H100.name,
        "share": H100.utilisation, "flops": H100.operations / 1e12, "inside": H100.inside / 1e9,
        "between": H100.between / 1e9, "host": H100.per_host,
    }  # fmt: skip
    parts = [HEAD.format(**told), *shapes(), MEMORY_HEAD.format(**told), *how_many(), SPEED_HEAD.format(**told)]
    return "\n".join([*parts, *how_fast(), TAIL])


HEAD = """\
# Scaling on paper

Worked out from shapes by `python scripts/scaling.py`, which prints this page; a test compares the two. **No number here
was measured on a GPU.** `llmalign plan RECIPE --gpus N --memory G` works the same out for a recipe.
"""
MEMORY_HEAD = """
## How many 80 GB GPUs

{rows} pair at a time: a prompt of {prompt:,} tokens, read once, and two answers of {answer:,} ({tokens:,} tokens). In
bfloat16 with AdamW, activation checkpointing, and gradients accumulated. The reference's log-probs are looked up; the
last column has the reference beside the policy, as engines hold it. GB are 1e9 bytes. Named are the fewest GPUs of 1,
2, 4, ... 64 and the first config that fits on them, in the order ddp, zero1, zero2, fsdp2, zero3.

*Passes*: activations and logits. *Other*: what is gathered, buckets, bfloat16 copies of float32 weights, 1 GB for CUDA
(1.5 GB on several GPUs). LoRA has rank {rank} on q and v, its frozen weights in bfloat16; 4-bit weights are not
sharded: each GPU holds them whole. 5 % of each GPU stay free for what an allocator loses.
"""
SPEED_HEAD = """
## Tokens a second

The same batch under ZeRO-3 on 8, 64 and 512 GPUs ({gpu}). Assumptions, to be replaced by your own:

- Computing goes at {share:.0%} of {flops:.0f} TFLOP/s, the peak of bfloat16 without sparsity
  ([torchtitan's table](https://github.com/pytorch/torchtitan/blob/main/torchtitan/tools/utils.py), after NVIDIA's data
  sheet). Measured by others, Llama 3.1 8B under FSDP on 8 and 128 H100s: 33 to 39 %; without compilation 5,762 and
  5,605 tokens a second and GPU
  ([torchtitan](https://github.com/pytorch/torchtitan/blob/main/benchmarks/llama3_h100_202412_torchtitan.md)).
- Sending goes at {inside:.0f} GB/s a GPU within a host of {host}: of NVLink's 450 GB/s one way about 380 were reached
  ([NCCL issue 1264](https://www.github.com/NVIDIA/nccl/issues/1264)).
- Between hosts it goes at {between:.0f} GB/s a GPU, 80 % of a 400 Gb/s link for each of them.
- ZeRO-3 gathers all weights twice in a micro-batch and scatters all gradients once, two bytes a number: three times the
  weights (under LoRA twice), of which (N - 1)/N go to others.
- Tokens a second: the smaller number where nothing is sent while the GPU computes, the larger where all of it is. Twice
  the tokens in a micro-batch are sent for at the same price; accumulating gathers again for each part.
"""
TAIL = """
Tokens are those that are read, each prompt once. Computing counts attention and checkpointing's second forward pass.
Sampling, evaluation and reading data are not in it.
"""
