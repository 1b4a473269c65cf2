"""The comparison with TRL is fair: the same completions reach all, and what should be the same gradient is."""

from pathlib import Path
from typing import Any

import pytest
import torch
from claims import copg_online, sampled, start, world
from claims.cells import Cell, Store
from claims.sampled_report import row
from datasets import Dataset

from llmalign.embedded.rewards import worth

SHORT = {**sampled.SHAPE, **sampled.SMOKE, "prompts": 3, "group": 4, "lr": 1e-3}
FIXED = {"data": "start", "rollout": "as fresh", "passes": 2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    start.quiet()
    return sampled.taught(Store(tmp_path_factory.mktemp("start")), smoke=True)


def varied(prompts: Any, completions: Any, **columns: Any) -> list[float]:
    """The model of two steps writes nothing that is worth more than another; this tells its answers apart."""
    return [sum(map(ord, text)) % 17 / 4 for text in completions]


def build(method: str, folder: Path, scratch: Path, *, moved: bool = False, **setting: Any) -> Any:
    cell = Cell("copg_online", method, 3, {**SHORT, **setting})
    model, tokenizer = world.load(folder)
    trainer = copg_online.build_trainer(
        cell,
        str(scratch),
        model=model,
        reward_funcs=varied,
        train_dataset=Dataset.from_list([{"prompt": prompt.text} for prompt in sampled.train_prompts(cell)]),
        processing_class=tokenizer,
    )
    if moved:
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for weights in model.parameters():
                weights += 0.02 * torch.randn(weights.shape, generator=generator)
    return trainer


def gradient(trainer: Any) -> torch.Tensor:
    model = trainer.model.train()
    batch = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    trainer._start_checked = True  # the policy is moved on purpose
    trainer.compute_loss(model, batch).backward()
    return torch.cat([weights.grad.flatten() for weights in model.parameters()])


def test_rloo_on_old_completions_as_if_fresh_is_copg(folder: Path, tmp_path: Path) -> None:
    """One step each, the divergence in the reward: CoPG's loss of a prompt is a sum over its K, RLOO's is a mean."""
    copg = gradient(build("copg-start", folder, tmp_path / "copg", moved=True, **FIXED))
    rloo = gradient(build("rloo-start", folder, tmp_path / "rloo", moved=True, **FIXED))
    assert copg.norm() > 0.1
    assert (copg - SHORT["group"] * rloo).norm() < 1e-4 * copg.norm()


@pytest.mark.parametrize("method", ["copg-start", "rloo-start", "grpo-start"])
@pytest.mark.parametrize("rollout", ["all", "as fresh"])
def test_completions_of_the_start_are_drawn_once_and_all_are_used(
    method: str, rollout: str, folder: Path, tmp_path: Path
) -> None:
    trainer = build(method, folder, tmp_path, **{**FIXED, "rollout": rollout})
    seen: list[tuple[str, str]] = []

    def watched(prompts: Any, completions: Any, **columns: Any) -> list[float]:
        seen.extend(zip(prompts, completions, strict=True))
        return varied(prompts, completions)

    trainer.reward_funcs = [watched]
    start.train(trainer)
    drawn = SHORT["rollouts"] * SHORT["prompts"] * SHORT["group"]
    # As fresh they are scored at each pass; in one rollout they are scored once.
    assert len(seen) == drawn * (FIXED["passes"] if rollout == "as fresh" else 1)
    assert len({prompt for prompt, _ in seen}) == SHORT["rollouts"] * SHORT["prompts"]
    for prompt in {prompt for prompt, _ in seen}:
        own = [text for asked, text in seen if asked == prompt]
        assert sorted(own) == sorted(own[: SHORT["group"]] * (len(own) // SHORT["group"]))


def test_a_pass_hands_out_each_completion_once(folder: Path) -> None:
    model, tokenizer = world.load(folder)
    cell = Cell("copg_online", "copg-start", 3, {**SHORT, **FIXED})
    drawn = sampled.Recorded(model, tokenizer, cell)
    (first, group), (second, other) = list(drawn.groups.items())[:2]
    assert len(drawn.groups) == SHORT["rollouts"] * SHORT["prompts"] and len(group) == SHORT["group"]
    assert drawn([list(first), list(second), list(first)]) == [group[0], other[0], group[1]]
    assert drawn([list(first)] * 5) == [*group, group[0]]


def test_what_is_measured_of_the_start_itself(folder: Path) -> None:
    model, tokenizer = world.load(folder)
    cell = Cell("copg_online", "copg", 3, SHORT)
    prompts = sampled.train_prompts(cell)
    found = sampled.measures(model, model, tokenizer, prompts, cell)
    drawn = world.answers(model, tokenizer, prompts, tokens=SHORT["tokens"], seed=3)
    texts = [tokenizer.decode(ids, skip_special_tokens=True) for ids in drawn]
    assert found["kl"] == 0.0
    assert found["reward"] == pytest.approx(sum(worth([p.text for p in prompts], texts)) / len(prompts))
    assert 0 < found["entropy"] < SHORT["tokens"] * 8  # at most log(1978) = 7.6 nats a token
    assert 0 < found["distinct"] <= 1


def test_the_objective_is_taken_seed_by_seed() -> None:
    keys = ("last_reward", "mean_reward", "last_kl", "last_entropy", "last_distinct", "training_cpu_seconds")
    records = [
        {
            "cell": {"method": "copg", "seed": seed, "setting": {"beta": 0.5}},
            "result": dict.fromkeys(keys, 1.0) | {"last_reward": reward, "last_kl": kl},
        }
        for seed, reward, kl in ((1, 1.0, 2.0), (2, 2.0, 4.0))
    ]
    assert row(records, "copg")[3] == "0.00 [0.00, 0.00]"
