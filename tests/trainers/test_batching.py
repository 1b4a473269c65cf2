"""The rows of a step never depend on who scores them; no part exceeds its budget; parts add up to the large batch."""

import itertools
import json
import os
import subprocess
import sys
import weakref
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator, skip_first_batches
from datasets import Dataset
from torch.utils.data import DataLoader

from llmalign import CoPGConfig, CoPGTrainer, RPOConfig, RPOTrainer
from llmalign.errors import UserError
from llmalign.trainers.batching import (
    MicroBatchMixin,
    RowSizes,
    StepSampler,
    balanced_groups,
    check_batching,
    group_weight,
    needed_parts,
    split_rows,
    take_rows,
)
from llmalign.trainers.pair import PairTrainerMixin
from llmalign.types import PromptGroups
from tests.trainers import tiny
from tests.trainers.building import LORA, build

KINDS = ("shared_prompt", "padding_free", "padded")


def sizes(rows: int, kind: str = "shared_prompt", seed: int = 0) -> RowSizes:
    """Pairs with prompt, chosen and rejected drawn lognormal, of 200 tokens each on average."""
    rng = np.random.default_rng(seed)
    lengths = np.exp(rng.normal(np.log(200) - 0.245, 0.7, size=(rows, 3))).astype(np.int64) + 1
    return RowSizes.of(kind, [lengths[:, 0], lengths[:, 1:].reshape(-1), np.full(rows, 2)])


def sampler(of: RowSizes, rank: int = 0, world: int = 1, effective: int = 16, **options) -> StepSampler:
    grad_accum = options.pop("grad_accum", 1)
    options = {"seed": 3, "drop_last": False} | options
    return StepSampler(of, effective, world, grad_accum, rank=rank, **options)


def steps(of: RowSizes, world: int, **options) -> list[list[list[int]]]:
    """Per step the list of every rank, the micro-batches of a step joined."""
    accumulated = options.get("grad_accum", 1)
    ranks = [list(sampler(of, rank, world, **options)) for rank in range(world)]
    joined = [[list(itertools.chain(*r[i : i + accumulated])) for i in range(0, len(r), accumulated)] for r in ranks]
    return [list(step) for step in zip(*joined, strict=True)]


def rows_of(step: list[list[int]]) -> list[int]:
    return sorted(itertools.chain(*step))


def weight(of: RowSizes, rows: list[int]) -> int:
    return group_weight(range(len(rows)), *of.lists(rows))


# --- lengths -------------------------------------------------------------------------------------------------------


def test_sizes_worked_by_hand() -> None:
    groups = PromptGroups([[1] * 10, [1] * 4], [[[2] * 3, [2] * 5], [[2] * 2, [2] * 1, [2] * 6]])
    shared, free, padded = (RowSizes.of_groups(groups, kind) for kind in KINDS)
    assert shared.tokens.tolist() == groups.unique_tokens() == [18, 13]
    assert free.tokens.tolist() == [13 + 15, 6 + 5 + 10]
    assert padded.tokens.tolist() == [2 * 15, 3 * 10]
    assert padded.sequences is not None and padded.sequences.tolist() == [2, 3]
    assert group_weight([0, 1], *padded.lists()) == 5 * 15
    # attention: every completion sees its prompt and itself, the prompt is read once or again
    assert shared.costs.tolist() == [int(18 + 0.001 * (13**2 + 15**2 - 10**2)), int(13 + 0.001 * (36 + 25 + 100 - 32))]
    assert padded.costs.tolist() == [2 * int(15 + 0.001 * 225), 3 * int(10 + 0.001 * 100)]
    rounded = RowSizes.of_groups(groups, "padded", multiple_of=8)
    assert rounded.tokens.tolist() == [2 * 16, 3 * 16]
    for kind in KINDS:  # what a sliding window is too short for is padded
        assert (RowSizes.of_groups(groups, kind, window=14).tokens == padded.tokens).all()
        assert (RowSizes.of_groups(groups, kind, window=15).tokens == RowSizes.of_groups(groups, kind).tokens).all()
    with pytest.raises(ValueError, match="'auto'"):
        RowSizes.of_groups(groups, "auto")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shuffled", [False, True])
def test_sizes_of_a_data_set_are_those_of_its_batches(kind: str, shuffled: bool) -> None:
    rng = np.random.default_rng(1)

    def ids(low: int = 1, high: int = 30) -> list[int]:
        return list(range(rng.integers(low, high)))

    pairs = [{"row_id": i, "prompt_ids": ids(1, 20)} | {f"{s}_ids": ids() for s in ("chosen", "rejected", "base")}
             for i in range(50)]  # fmt: skip
    grouped = [{"row_id": i, "prompt_ids": ids(1, 20), "completion_ids": [ids() for _ in range(i % 4 + 1)]}
               for i in range(50)]  # fmt: skip
    for rows in (pairs, [{k: v for k, v in row.items() if k != "base_ids"} for row in pairs], grouped):
        dataset = Dataset.from_list(rows)
        if shuffled:
            dataset = dataset.shuffle(seed=1).select(range(5, 40))
        limit = 25
        completions = [
            row["completion_ids"] if "completion_ids" in row else
            [row[f"{s}_ids"] for s in ("chosen", "rejected", "base") if f"{s}_ids" in row]
            for row in dataset
        ]  # fmt: skip
        groups = PromptGroups(
            [row["prompt_ids"] for row in dataset],
            [[c[: limit - len(row["prompt_ids"])] for c in group]
             for row, group in zip(dataset, completions, strict=True)],
        )  # fmt: skip
        expected, got = RowSizes.of_groups(groups, kind), RowSizes.of_dataset(dataset, kind, limit)
        np.testing.assert_array_equal(got.tokens, expected.tokens)
        np.testing.assert_array_equal(got.costs, expected.costs)
        assert RowSizes.of_dataset(dataset, kind, None).tokens.sum() > got.tokens.sum()


# --- cutting -------------------------------------------------------------------------------------------------------


def every_cut(rows: int, parts: int):
    for cuts in itertools.combinations(range(1, rows), parts - 1):
        edges = [0, *cuts, rows]
        yield [list(range(a, b)) for a, b in itertools.pairwise(edges)]


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("seed", range(6))
def test_split_is_the_best_of_all_cuts(seed: int, padded: bool) -> None:
    tokens, sequences = sizes(8, "padded" if padded else "shared_prompt", seed).lists()
    for parts in range(1, 9):
        got = split_rows(tokens, parts, sequences)
        assert len(got) == parts and all(got) and list(itertools.chain(*got)) == list(range(8))
        largest = [max(group_weight(p, tokens, sequences) for p in cut) for cut in every_cut(8, parts)]
        assert max(group_weight(part, tokens, sequences) for part in got) == min(largest)
        budget = min(largest)
        if budget >= max(tokens):
            assert needed_parts(tokens, budget, sequences) <= parts
            if budget > max(tokens):
                assert needed_parts(tokens, budget - 1, sequences) > parts
    with pytest.raises(ValueError, match="8 rows cannot be cut into 9 parts"):
        split_rows(tokens, 9, sequences)


def test_a_row_over_the_budget_is_named_with_the_way_out() -> None:
    sentence = "Row 71 alone has 30 tokens, more than tokens_per_batch 20; raise tokens_per_batch to at least 30 or"
    with pytest.raises(UserError, match=sentence):
        needed_parts([10, 30, 25], 20, row_ids=torch.tensor([70, 71, 72]))
    of = RowSizes(np.array([10, 30, 25]), np.array([10, 30, 25]))
    with pytest.raises(UserError, match=sentence):
        sampler(of, effective=2, tokens_per_batch=20, row_ids=[70, 71, 72])


@pytest.mark.parametrize("kind", KINDS)
def test_groups_are_balanced(kind: str) -> None:
    tokens, sequences = sizes(64, kind).lists()
    groups = balanced_groups(tokens, 8, sequences)
    loads = [group_weight(group, tokens, sequences) for group in groups]
    assert len(groups) == 8 and all(groups) and sorted(itertools.chain(*groups)) == list(range(64))
    assert loads == sorted(loads, reverse=True)
    even = group_weight(range(64), tokens, None) / 8
    assert max(loads) < (1.3 if kind == "padded" else 1.05) * max(even, max(tokens))


# --- the rows of a step --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_the_rows_of_a_step_are_the_same_whoever_scores_them(kind: str) -> None:
    of = sizes(100, kind)
    longest = int(of.tokens.max())
    expected = [rows_of(step) for step in steps(of, 1)]
    assert [len(step) for step in expected] == [16] * 6 + [4] and rows_of(expected) == list(range(100))
    for world, options in itertools.product(
        (1, 2, 4),
        ({"grad_accum": 1}, {"grad_accum": 4}, {"tokens_per_batch": longest}, {"tokens_per_batch": 3 * longest}),
    ):
        got = [rows_of(step) for step in steps(of, world, **options)]
        assert got[:-1] == expected[:-1]
        assert set(got[-1]) >= set(expected[-1]) and len(got) == len(expected)
        assert [rows_of(step) for step in steps(of, world, drop_last=True, **options)] == expected[:-1]


def test_a_tail_smaller_than_its_parts_repeats_its_own_rows_and_says_which() -> None:
    of = RowSizes(np.full(11, 100), np.full(11, 100))
    assert rows_of(steps(of, 2, effective=8, tokens_per_batch=200)[-1]) == rows_of(steps(of, 1, effective=8)[-1])
    whole = steps(of, 2, effective=8, tokens_per_batch=100)
    tail = torch.randperm(11, generator=torch.Generator().manual_seed(3))[8:].tolist()
    assert len(whole) == 2 and rows_of(whole[1]) == sorted([*tail, tail[0]])  # two parts on each of two ranks
    assert all(len(share) == 2 for share in whole[1])
    for options, lists in (({"tokens_per_batch": 100}, 1), ({"grad_accum": 4}, 4)):
        counted = []
        for rank in range(2):
            own = sampler(of, rank, 2, effective=8, **options)
            ends, marks = list(own)[-lists:], own.fillers()
            assert [len(rows) for rows in ends] == [len(places) for places in marks]
            pairs = zip(itertools.chain(*ends), itertools.chain(*marks), strict=True)
            counted += [row for row, filler in pairs if not filler]
        assert sorted(counted) == sorted(tail)


def test_the_order_follows_the_seed_and_the_epoch() -> None:
    of = sizes(64)
    one, other, third = sampler(of), sampler(of), sampler(of, seed=4)
    assert list(one) == list(other) != list(third)
    other.set_epoch(1)
    assert list(one) != list(other)
    assert rows_of(list(one)) == rows_of(list(other)) == list(range(64))
    assert [rows_of([step]) for step in sampler(of, shuffle=False)][1] == list(range(16, 32))


# --- budgets -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("seed", range(4))
def test_every_part_stays_within_the_budget_and_ranks_agree(seed: int, world: int, kind: str) -> None:
    of = sizes(150, kind, seed)
    for factor in (1, 1.3, 2, 5):
        budget = int(factor * of.tokens.max())
        loads = []
        for step in steps(of, world, effective=32, tokens_per_batch=budget):
            agreed = max(needed_parts(*with_budget(of, share, budget)) for share in step)
            loads.append([])
            for share in step:
                assert len(share) >= agreed
                tokens, sequences = of.lists(share)
                parts = split_rows(tokens, agreed, sequences)
                assert len(parts) == agreed and all(parts)
                weights = [group_weight(part, tokens, sequences) for part in parts]
                assert max(weights) <= budget
                loads[-1].append(sum(weights))
            if kind != "padded":  # no more than one part above what no split could do without
                assert agreed <= np.ceil(sum(loads[-1]) / world / budget) + 1
        assert time_over_even(loads[:-1]) < 1.15


def time_over_even(loads: list[list[int]]) -> float:
    """Everyone waits for the heaviest rank: the time that takes, over that of an even split."""
    return sum(map(max, loads)) / np.sum(loads) * len(loads[0])


def with_budget(of: RowSizes, rows: list[int], budget: int) -> tuple:
    tokens, sequences = of.lists(rows)
    return tokens, budget, sequences


@pytest.mark.parametrize("kind", KINDS)
def test_micro_batches_by_rows_cost_alike(kind: str) -> None:
    of = sizes(640, kind)
    ranks = [list(sampler(of, rank, 4, effective=128, grad_accum=4)) for rank in range(4)]
    assert {len(rank) for rank in ranks} == {5 * 4}
    costs = RowSizes(of.costs, of.costs, of.sequences)
    slots = [[weight(costs, rows) for rows in slot] for slot in zip(*ranks, strict=True)]
    assert time_over_even(slots) < 1.1


def test_budget_and_accumulation_exclude_each_other() -> None:
    with pytest.raises(ValueError, match="grad_accum must be 1"):
        sampler(sizes(64), grad_accum=2, tokens_per_batch=10_000)


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"tokens_per_batch": 0}, "positive whole number, got 0"),
        ({"tokens_per_batch": True}, "positive whole number, got True"),
        ({"gradient_accumulation_steps": 4}, "make per_device_train_batch_size the rows of a step per process"),
        ({"train_sampling_strategy": "group_by_length"}, "leave it at random"),
    ],
)
def test_what_contradicts_a_budget_is_refused(wrong: dict, sentence: str) -> None:
    good = {"tokens_per_batch": 1000, "gradient_accumulation_steps": 1, "train_sampling_strategy": "random"}
    check_batching(SimpleNamespace(**good))
    check_batching(SimpleNamespace(**good | wrong | {"tokens_per_batch": None}))
    with pytest.raises(UserError, match=sentence):
        check_batching(SimpleNamespace(**good | wrong))


# --- batches -------------------------------------------------------------------------------------------------------


def test_taken_rows_bring_their_groups_and_tensors() -> None:
    batch = {
        "row_id": torch.tensor([7, 8, 9]),
        "groups": PromptGroups([[1], [2], [3]], [[[4], [5]], [[6]], [[7], [8], [9]]]),
        "rewards": torch.arange(6).reshape(3, 2),
    }
    taken = take_rows(batch, [2, 0])
    assert taken["row_id"].tolist() == [9, 7] and taken["rewards"].tolist() == [[4, 5], [0, 1]]
    assert taken["groups"] == PromptGroups([[3], [1]], [[[7], [8], [9]], [[4], [5]]])
    assert list(taken) == list(batch)
    with pytest.raises(TypeError, match="text of a batch is a list"):
        take_rows(batch | {"text": ["a", "b", "c"]}, [0])


@pytest.mark.parametrize("options", [{"tokens_per_batch": 4000}, {"grad_accum": 4}])
def test_a_skipped_loader_goes_on_where_the_whole_one_was(options: dict) -> None:
    def epoch(number: int, skip: int = 0) -> list[list[int]]:
        of = sampler(sizes(100), **options)
        loader = Accelerator(cpu=True).prepare(DataLoader(range(100), batch_sampler=of, collate_fn=list))
        loader = skip_first_batches(loader, skip)
        of.set_epoch(number)
        loader.set_epoch(number)
        return list(loader)

    assert len(epoch(1)) == len(sampler(sizes(100), **options))
    assert epoch(1, skip=3) == epoch(1)[3:] != epoch(0)[3:]


# --- trainers ------------------------------------------------------------------------------------------------------

ROWS = 22  # two steps of 8 and a tail of 6
TRAINED = {
    "pairs": (RPOTrainer, RPOConfig, lambda: tiny.pairs(ROWS, base=lambda i: "b" * (i % 7 + 1)), {"beta": 0.1}),
    "groups": (CoPGTrainer, CoPGConfig, lambda: tiny.groups(ROWS), {"beta": 0.1}),
}


def trained(method: str, folder: Path, resume: str | None = None, peft=None, **options):
    """A trainer after two epochs, and for each step what its parts held: row ids and tokens in the layout used."""
    trainer, config, rows, own = TRAINED[method]
    if not (folder / "model").exists():
        tiny.save(folder / "model")
    built = build(
        trainer, config, str(folder / "model"), folder / "out", data=rows(), max_steps=-1, num_train_epochs=2,
        peft=peft, reference=tiny.model(1), **({"per_device_train_batch_size": 8} | own | options),
    )  # fmt: skip
    parts: dict[int, list[tuple[list[int], int]]] = {}
    scores = built.scores

    def spy(model, inputs):
        taken = RowSizes.of_groups(inputs["groups"], built.scorer.kind)
        tokens = group_weight(range(len(taken.tokens)), *taken.lists())
        parts.setdefault(built.state.global_step, []).append((inputs["row_id"].tolist(), tokens))
        return scores(model, inputs)

    built.scores = spy
    built.train(resume_from_checkpoint=resume)
    return built, parts


def measured(built) -> list[tuple[float, float]]:
    return [(entry["loss"], entry["grad_norm"]) for entry in built.state.log_history if "loss" in entry]


@pytest.mark.parametrize(
    ("method", "scoring"),
    [
        ("pairs", "padded"),
        ("groups", "shared_prompt"),
        pytest.param("pairs", "shared_prompt", marks=pytest.mark.slow),
        pytest.param("groups", "padded", marks=pytest.mark.slow),
    ],
)
def test_parts_train_as_the_large_batch_does(method: str, scoring: str, tmp_path: Path) -> None:
    whole, steps_of_whole = trained(method, tmp_path, scoring=scoring, train_sampling_strategy="batch_rebalance")
    assert [len(parts) for parts in steps_of_whole.values()] == [1] * 6
    budget = 200 if scoring == "shared_prompt" or method == "pairs" else 300
    for options in (
        {"tokens_per_batch": budget},
        {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4,
         "train_sampling_strategy": "batch_rebalance"},
    ):  # fmt: skip
        split, parts = trained(method, tmp_path, scoring=scoring, **options)
        assert min(len(step) for step in parts.values()) >= 2
        for step, of_whole in steps_of_whole.items():
            assert sorted(itertools.chain(*(ids for ids, _ in parts[step]))) == sorted(of_whole[0][0])
            if "tokens_per_batch" in options:
                assert max(tokens for _, tokens in parts[step]) <= budget
        np.testing.assert_allclose(measured(split), measured(whole), rtol=1e-5, atol=1e-5)
        for name, weight in whole.model.state_dict().items():
            torch.testing.assert_close(split.model.state_dict()[name], weight, rtol=1e-5, atol=1e-5, msg=name)
    once = [ids for step in range(3) for ids in steps_of_whole[step][0][0]]
    assert sorted(once) == list(range(ROWS))
    assert once != [ids for step in range(3, 6) for ids in steps_of_whole[step][0][0]]


def test_resumed_within_an_epoch_it_ends_at_the_same_weights(tmp_path: Path) -> None:
    options = {"tokens_per_batch": 150, "save_strategy": "steps", "save_steps": 2, "peft": LORA}
    whole, parts = trained("pairs", tmp_path, **options)
    resumed, rest = trained("pairs", tmp_path, str(tmp_path / "out" / "checkpoint-4"), **options)
    assert rest == {step: parts[step] for step in (4, 5)}
    for name, weight in whole.model.state_dict().items():
        assert torch.equal(weight, resumed.model.state_dict()[name]), name


def test_the_graph_of_a_part_is_freed_before_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    graphs: list[weakref.ref] = []
    alive: list[int] = []
    compute_loss = PairTrainerMixin.compute_loss

    def spy(self, model, inputs, **options):
        alive.append(sum(graph() is not None for graph in graphs))
        loss = compute_loss(self, model, inputs, **options)
        graphs.append(weakref.ref(loss))
        return loss

    monkeypatch.setattr(PairTrainerMixin, "compute_loss", spy)
    trained("pairs", tmp_path, tokens_per_batch=150)
    assert len(alive) > 12 and set(alive) == {0}


def test_a_stream_is_cut_too(tmp_path: Path) -> None:
    results = [
        trained_stream(tmp_path, tokens_per_batch=budget, max_steps=3, per_device_train_batch_size=8)
        for budget in (None, 150)
    ]
    np.testing.assert_allclose(*results, rtol=1e-5, atol=1e-5)


def trained_stream(folder: Path, **options) -> list[tuple[float, float]]:
    stream = tiny.pairs(ROWS).to_iterable_dataset()
    built = build(RPOTrainer, RPOConfig, tiny.save(folder / "model"), folder / "out", data=stream, **options)
    built.train()
    return measured(built)


def test_a_long_row_is_refused_before_the_first_step(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"Row \d+ alone has \d+ tokens, more than tokens_per_batch 30; raise"):
        trained("pairs", tmp_path, tokens_per_batch=30)
    with pytest.raises(UserError, match="gradient_accumulation_steps=2 has no place beside it"):
        trained("pairs", tmp_path, tokens_per_batch=300, gradient_accumulation_steps=2)


def test_streams_are_refused_where_ranks_must_stay_in_step() -> None:
    class Sharded(MicroBatchMixin):
        is_deepspeed_enabled, is_fsdp_enabled = True, False
        args = SimpleNamespace(tokens_per_batch=100)
        train_dataset = tiny.pairs(2).to_iterable_dataset()

    with pytest.raises(UserError, match="on a stream works on one process or under DDP"):
        Sharded().get_train_dataloader()


def test_ranks_that_cannot_agree_stop_with_a_sentence(tmp_path: Path) -> None:
    class Batches:
        def get_batch_samples(self, iterator, number, device):
            return [next(iterator)], torch.tensor(3)

    class OneOfTwo(MicroBatchMixin, Batches):
        args = SimpleNamespace(tokens_per_batch=10, pad_to_multiple_of=None)
        scorer = SimpleNamespace(kind="padded")
        model = tiny.model()
        accelerator = SimpleNamespace(
            device="cpu",
            num_processes=2,
            gather=lambda own: torch.cat([own, torch.tensor([[3, 4]])]),  # the other rank needs three
        )

    batch = {"row_id": torch.arange(2), "groups": PromptGroups([[1]] * 2, [[[1], [1]]] * 2)}
    with pytest.raises(UserError, match="a process has 2 rows for a step in 3 parts.*set scoring: padded"):
        OneOfTwo().get_batch_samples(iter([batch]), 1, torch.device("cpu"))


SCRIPT = """
import json, os, sys
from pathlib import Path

import torch
from tests.trainers.test_batching import measured, trained

folder, budget = Path(sys.argv[1]), int(sys.argv[2])
world, rank = int(os.environ["WORLD_SIZE"]), int(os.environ["RANK"])
options = {
    "per_device_train_batch_size": 8 // world, "tokens_per_batch": budget, "save_strategy": "steps", "save_steps": 4,
    "use_cpu": True,
}
whole, parts = trained("pairs", folder, **options)
assert type(whole.model_wrapped).__name__ == "DistributedDataParallel"
resumed, rest = trained("pairs", folder, str(folder / "out" / "checkpoint-4"), **options)
assert rest == {step: parts[step] for step in (4, 5)}, "resumed with other rows"
weights = whole.model.state_dict()
assert all(torch.equal(weights[name], weight) for name, weight in resumed.model.state_dict().items())
(folder / f"{rank}.json").write_text(json.dumps({"measured": measured(whole), "parts": list(parts.values())}))
torch.distributed.destroy_process_group()
"""


@pytest.mark.slow
def test_two_processes_cut_and_resume_as_one_does(tmp_path: Path) -> None:
    one, parts_of_one = trained("pairs", tmp_path, tokens_per_batch=200)
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script),
         str(tmp_path), "93"],
        env=os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, cwd=root,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    ranks = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    np.testing.assert_allclose(ranks[0]["measured"], measured(one), rtol=1e-5, atol=1e-5)
    for step, both in enumerate(zip(*(rank["parts"] for rank in ranks), strict=True)):
        assert len(both[0]) == len(both[1]) >= 2
        assert max(tokens for parts in both for _, tokens in parts) <= 93
        ids = sorted(i for parts in both for held, _ in parts for i in held)
        assert ids == sorted(i for held, _ in parts_of_one[step] for i in held)
