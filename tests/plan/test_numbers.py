"""Parts, shares, steps and times worked out by hand."""

from dataclasses import replace

import numpy as np
import pytest

from llmalign.plan.memory import generation_cache, head_logits, optimizer_state, sampling_logits
from llmalign.plan.outline import Weights
from llmalign.plan.rows import Lengths, counted, longest_batch, sampled_steps, steps_of
from llmalign.plan.sharding import BUCKET, CHANNELS, CONTEXT, Held, spread
from llmalign.plan.suggest import accumulation_for, choose, command, sizes, usable
from llmalign.plan.timing import H100, Work, communication, forward, operations, readable, step_seconds, work_of
from llmalign.plan.trace import Peak
from llmalign.scores.scoring import PADDED, PADDING_FREE, SHARED_PROMPT

BILLION = 1_000_000_000
#: seven billion numbers, all trained, in float32
SEVEN = Weights(7 * BILLION, 7 * BILLION, 28e9, 28e9, largest_layer=200_000_000, outside=600_000_000)
FULL = Held(SEVEN, state=56e9, bf16=True)
PEAK = Peak(activations=3e9, logits=1e9, gradients=28e9, copies=14e9)


def test_states_of_optimizers() -> None:
    shapes = [(100, 40), (100,)]
    assert optimizer_state("adamw_torch_fused", shapes) == 8 * 4100
    assert optimizer_state("adamw_bnb_8bit", shapes) == 2 * 4100
    assert optimizer_state("sgd", shapes) == 0
    assert optimizer_state("sgd", shapes, momentum=True) == 4 * 4100
    assert optimizer_state("adafactor", shapes) == 4 * (100 + 40) + 4 * 100
    assert optimizer_state("galore_adamw", shapes) is None


def test_cache_of_seven_billion() -> None:
    """Llama-2-7B holds half a megabyte a token in bfloat16: 2 x 32 layers x 4096 x 2 bytes."""
    assert generation_cache(32, 32, 128, 2, rows=1, tokens=1) == 524_288
    assert generation_cache(80, 8, 128, 2, rows=4, tokens=1000) == 4000 * 327_680


def test_logits() -> None:
    assert sampling_logits(8, 32_000) == 16 * 8 * 32_000
    assert head_logits(0, 32_000) == 0
    assert head_logits(100, 32_000) == 100 * 32_000 * 14  # less than a chunk
    # 2^26 numbers are 2,097 rows of 32,000; 5,000 rows make three chunks of 1,667
    assert head_logits(5000, 32_000) == 1667 * 32_000 * 14


def test_one_process_and_ddp() -> None:
    single = spread("single", 1, FULL, PEAK)
    assert single.parts["weights"] == single.parts["gradients"] == 28e9
    assert single.total == 28e9 + 28e9 + 56e9 + 3e9 + 1e9 + 14e9 + CONTEXT
    ddp = spread("ddp", 8, FULL, PEAK)
    assert ddp.total == single.total + 28e9 + CHANNELS  # the buckets that gradients are reduced in


def test_zero_on_eight() -> None:
    peak = replace(PEAK, copies=0)
    zero1, zero2, zero3 = (spread(name, 8, FULL, peak) for name in ("zero1", "zero2", "zero3"))
    # 2 + 2 + 12 bytes a number, of which stage by stage 12, 14 and 16 are shared
    assert zero1.parts["weights"] + zero1.parts["gradients"] == 28e9
    assert zero1.parts["optimizer"] == 12 * 7e9 / 8
    assert zero2.parts["weights"] == 14e9 and zero2.parts["gradients"] == 14e9 / 8
    states = [zero3.parts[name] for name in ("weights", "gradients", "optimizer")]
    assert sum(states) == 16 * 7e9 / 8
    assert zero3.parts["gathered weights"] == 2e9  # at most 1e9 numbers
    assert zero1.parts["buckets"] == BUCKET * 2 and zero2.parts["buckets"] == 2 * BUCKET * 2


def test_offload_moves_the_optimizer() -> None:
    peak = replace(PEAK, copies=0)
    here, there = spread("zero2", 8, FULL, peak), spread("zero2_offload", 8, FULL, peak)
    assert "optimizer" not in there.parts
    assert here.total - there.total == here.parts["optimizer"]
    assert there.host == 12 * 7e9 / 8 + 4 * 7e9 / 8


def test_fsdp2_keeps_float32_shards() -> None:
    device = spread("fsdp2", 8, FULL, replace(PEAK, copies=0))
    states = [device.parts[name] for name in ("weights", "gradients", "optimizer")]
    assert sum(states) == 16 * 7e9 / 8
    assert device.parts["gathered weights"] == (0.6e9 + 2 * 0.2e9) * 2


def test_weights_in_bfloat16_have_a_narrow_state_only_where_torch_steps_on_them() -> None:
    narrow = replace(FULL, weights=replace(SEVEN, bytes=14e9, trained_bytes=14e9))
    peak = replace(PEAK, copies=0, gradients=14e9)
    names = ("weights", "gradients", "optimizer")
    held = {name: [spread(name, 8, narrow, peak).parts[part] for part in names] for name in ("ddp", "zero3", "fsdp2")}
    assert held["ddp"] == [14e9, 14e9, 28e9]  # 2 + 2 + 4 bytes a number
    assert sum(held["zero3"]) == 16 * 7e9 / 8  # 2 + 2 + 12
    assert held["fsdp2"] == [28e9 / 8, 28e9 / 8, 56e9 / 8]  # float32 all


def test_frozen_models_are_shared_under_zero3_alone() -> None:
    held = replace(FULL, frozen={"reference": SEVEN})
    assert spread("ddp", 4, held, PEAK).parts["reference"] == 28e9
    assert spread("zero2", 4, held, PEAK).parts["reference"] == 14e9
    assert spread("zero3", 4, held, PEAK).parts["reference"] == 14e9 / 4


def test_an_adapter_leaves_little_to_share() -> None:
    weights = Weights(7 * BILLION, 10_000_000, 14e9 + 20e6, 40e6)
    device = spread("ddp", 4, Held(weights, 80e6, True), Peak(gradients=40e6))
    assert device.parts["weights"] == 14e9 + 20e6
    assert device.parts["gradients"] == device.parts["DDP's buckets"] == 40e6


LENGTHS = Lengths(np.array([10, 4, 20]), np.array([5, 7, 2, 3, 1, 9]), np.array([2, 2, 2]))


def test_rows_under_each_layout() -> None:
    assert LENGTHS.whole().tolist() == [15, 17, 6, 7, 21, 29]
    assert LENGTHS.widest().tolist() == [17, 7, 29]
    shared = counted(LENGTHS, SHARED_PROMPT, 2, repeats=False)
    assert (shared.tokens, shared.fed, shared.padding, shared.longest) == (61, 61, 0.0, 29)
    free = counted(LENGTHS, PADDING_FREE, 2, repeats=True)
    assert (free.tokens, free.fed, free.padding) == (95, 95, 0.0)
    padded = counted(LENGTHS, PADDED, 1, repeats=True)
    assert padded.fed == 2 * (17 + 7 + 29)
    assert padded.padding == pytest.approx(1 - 95 / 106)


def test_the_longest_rows_together() -> None:
    batch = longest_batch(LENGTHS, LENGTHS.sizes(SHARED_PROMPT), 2)
    assert batch.prompts.tolist() == [20, 10]
    assert batch.completions.tolist() == [1, 9, 5, 7]
    within = longest_batch(LENGTHS, LENGTHS.sizes(SHARED_PROMPT), 3, budget=52)
    assert within.prompts.tolist() == [20, 10]  # 30 + 22, and 9 more do not fit
    padded = longest_batch(LENGTHS, LENGTHS.sizes(PADDED), 3, budget=100)
    assert padded.prompts.tolist() == [20]  # two rows would be four sequences of 29


def test_steps() -> None:
    assert steps_of(1000, 4, 8, 1, 1.0, -1) == 32  # 250 batches, 31 whole steps and a part
    assert steps_of(1000, 4, 8, 4, 3.0, -1) == 24
    assert steps_of(1000, 4, 8, 4, 3.0, 7) == 7


def test_steps_of_runs_that_sample() -> None:
    """Eight completions of each of 6,400 prompts; a rollout holds eight prompts, or sixty-four, and goes over twice."""
    assert sampled_steps(6400, 8, 1, 1, 1.0, -1) == 800
    assert sampled_steps(6400, 64, 8, 8, 1.0, -1) == 100
    assert sampled_steps(6400, 64, 2 * 8, 8, 1.0, -1) == 200
    assert sampled_steps(6400, 8, 1, 1, 1.0, 5) == 5
    assert sampled_steps(7, 1, 3, 2, 1.0, -1) == 11  # 21 micro-batches, the last alone in its step


def test_operations_by_hand() -> None:
    work = Work(tokens=10, scored=4, pairs=55)
    once = 2 * (10 * 100 + 4 * 30) + 4 * 55 * 8
    numbers = {"body": 100, "head": 30, "width": 8}
    assert forward(work, **numbers) == once
    assert operations(work, **numbers, adapter=False, checkpointing=True, frozen=1) == 5 * once
    assert operations(work, **numbers, adapter=True, checkpointing=False, frozen=0) == 2 * once + 4 * 55 * 8


def test_attention_sees_the_prompt_once() -> None:
    one = Lengths(np.array([4]), np.array([2, 3]), np.array([2]))
    # the prompt: 1 + 2 + 3 + 4; answers: 2 x 4 + 3 and 3 x 4 + 6
    assert work_of(one, SHARED_PROMPT, 9).pairs == 10 + 11 + 18
    assert work_of(one, PADDING_FREE, 13).pairs == 6 * 7 / 2 + 7 * 8 / 2


def test_what_is_sent() -> None:
    assert communication("single", 1, 7e9, 7e9, 2, 0) == 0
    assert communication("zero3", 8, 7e9, 7e9, 2, 0) == 3 * 7e9 * 2 * 7 / 8
    assert communication("zero3", 8, 7e9, 1e7, 2, 7e9) == (3 * 7e9 + 1e7) * 2 * 7 / 8
    assert communication("ddp", 4, 7e9, 7e9, 2, 0) == 2 * 7e9 * 4 * 3 / 4
    low, high = step_seconds(989e12 * 0.35, 370e9 / 2, H100, 8)
    assert (low, high) == (1.0, 1.5)
    assert step_seconds(989e12 * 0.35, 40e9 * 3, H100, 64) == (3.0, 4.0)


def test_times_in_words() -> None:
    assert [readable(seconds) for seconds in (0.02, 5, 600, 8000, 200_000)] == [
        "20 ms",
        "5.0 s",
        "10.0 min",
        "2.2 h",
        "2.3 days",
    ]


def test_a_total_batch_is_kept() -> None:
    assert accumulation_for(128, 4, 8) == 4
    assert accumulation_for(128, 3, 8) == 6  # 144: the next number of rows
    assert sizes(8, 128, 8) == [8, 4, 2, 1]
    assert sizes(8, 16, 8) == [2, 1]
    assert sizes(12, 100, 1, unit=4) == [12, 4]


def test_the_least_change_is_suggested() -> None:
    """A config of 50 and 10 a row, half of that with checkpoints; 95 of 100 may be filled."""
    asked = []

    def measure(config: str, size: int, accumulation: int, checkpointing: bool):  # noqa: ANN202
        asked.append((config, size, accumulation, checkpointing))
        base = {"ddp": 90, "zero3": 20}[config]
        return type("Device", (), {"total": base + size * (5 if checkpointing else 10)}), "a moment"

    options = {"memory": 100, "size": 16, "total": 64, "devices": 2, "checkpointing": False}
    assert usable(100) == 95
    found = choose(["zero3", "ddp"], measure, **options)
    assert found is not None and (found.config, found.size, found.accumulation, found.checkpointing) == (
        "ddp",
        1,
        32,
        True,
    )
    found = choose(["zero3"], measure, **options)
    assert found is not None and (found.size, found.checkpointing) == (4, False)
    assert command("r.yaml", found, 2, ["--beta", "0.1"]) == (
        "llmalign train r.yaml --accelerate zero3 --num_processes 2 --beta 0.1 --per_device_train_batch_size 4 "
        "--gradient_accumulation_steps 8 --activation_checkpointing false"
    )
    assert choose(["ddp"], measure, **{**options, "memory": 50}) is None
