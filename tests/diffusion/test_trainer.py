"""The trainer's loss on a batch, from the pictures up: against plain diffusers, and what a row meets by chance."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from llmalign import losses
from llmalign.diffusion.noise import draw
from llmalign.diffusion.trainer import DiffusionPreferenceTrainer
from llmalign.types import PairScores
from tests.diffusion import by_hand
from tests.diffusion.by_hand import SIDES, Settings
from tests.diffusion.training import pairs, trainer

BETA = 30.0
NAMES = ("chosen", "rejected", "ref_chosen", "ref_rejected", "last_chosen", "last_rejected")


def shake(built: DiffusionPreferenceTrainer, seed: int = 0) -> None:
    """Move the policy away from where it started, which the check of the first batch would refuse."""
    built.start_may_differ = "moved by a test"
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in built.model.parameters():
            if value.requires_grad:
                value += 0.1 * torch.randn(value.shape, generator=generator)


def batch_of(built: DiffusionPreferenceTrainer, rows: list[int]) -> dict[str, Any]:
    return built.data_collator([built.train_dataset[row] for row in rows])


def scored(built: DiffusionPreferenceTrainer, rows: list[int], epoch: float = 0.0) -> PairScores:
    built.state.epoch = epoch
    built.model.train()
    with torch.no_grad():
        return built.scores(built.model, batch_of(built, rows))


def plain(built: DiffusionPreferenceTrainer, kind: str, tiny_pipeline: Any, folder: Any) -> Any:
    """The policy as an ordinary pipeline, by the files that it writes."""
    built.save_model(str(folder / "out"))
    pipe = tiny_pipeline(kind)
    if built.model.has_adapters:
        pipe.load_lora_weights(folder / "out")
        return pipe
    return type(pipe).from_pretrained(folder / "out")


def assert_scores(found: PairScores, *expected: dict[str, list[float]], scale: float = 1.0) -> None:
    """Scores against errors of policy and reference, and of the previous iterate."""
    values = [values[side] for values in expected for side in SIDES]
    for name, errors in zip(NAMES, values, strict=False):
        torch.testing.assert_close(
            getattr(found, name), -scale / 2 * torch.tensor(errors), rtol=2e-5, atol=1e-6, msg=f"{name} is {found}"
        )


# From the pictures up


@pytest.mark.parametrize("kind, lora", [("sd", True), ("sd", False), ("sd2", True), ("sd3", True)])
def test_loss_of_a_batch_by_hand(kind, lora, tiny_pipeline, tmp_path):
    built = trainer(tiny_pipeline(kind), tmp_path, peft=lora, beta=BETA)
    shake(built)
    rows = [6, 1, 3]
    built.model.train()
    loss = built.compute_loss(built.model, batch_of(built, rows))
    policy, reference = by_hand.errors(
        [plain(built, kind, tiny_pipeline, tmp_path), tiny_pipeline(kind)], pairs().select(rows), Settings()
    )
    margins = [
        -0.5 * BETA * ((policy["chosen"][i] - policy["rejected"][i])
                       - (reference["chosen"][i] - reference["rejected"][i]))
        for i in range(3)
    ]  # fmt: skip
    assert max(map(abs, margins)) > 0.05
    expected = sum(math.log1p(math.exp(-margin)) for margin in margins) / 3
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    scores = scored(built, rows)
    assert_scores(scores, policy, reference)
    assert losses.dpo(scores, beta=BETA).mean().item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    "changes",
    [
        {"shared_noise": False},
        {"sample_latents": False},
        {"caption_dropout": 0.5},
        {"random_flip": "image"},
        {"random_flip": "pair", "seed": 7},
    ],
    ids=lambda changes: "-".join(changes),
)
def test_options_of_a_batch_by_hand(changes, tiny_pipeline, tmp_path):
    built = trainer(tiny_pipeline("sd"), tmp_path, **changes)
    shake(built)
    pipes = [plain(built, "sd", tiny_pipeline, tmp_path), tiny_pipeline("sd")]
    expected = by_hand.errors(pipes, pairs().select(range(5)), Settings(**changes), epoch=2)
    assert_scores(scored(built, list(range(5)), epoch=2.5), *expected)


def test_flips_and_dropped_captions_come_in_both_kinds():
    draws = draw((42, "train", 2), range(5), (4, 4, 4))  # those of the test above
    assert 0 < (draws.drop < 0.5).sum() < 5
    assert (draws.flip[:, 0] < 0.5).ne(draws.flip[:, 1] < 0.5).any()


def test_reference_and_policy_meet_the_same_and_gradients_are_the_policys(tiny_pipeline, tmp_path):
    built = trainer(tiny_pipeline("sd"), tmp_path, peft=False)
    built.model.train()
    scores = built.scores(built.model, batch_of(built, [0, 1]))
    assert scores.chosen.requires_grad and scores.rejected.requires_grad
    assert not scores.ref_chosen.requires_grad and not scores.ref_rejected.requires_grad
    torch.testing.assert_close(scores.chosen.detach(), scores.ref_chosen, rtol=1e-6, atol=0)
    assert not any(value.requires_grad for value in built.reference.parameters())
    losses.dpo(scores, beta=BETA).sum().backward()
    assert all(value.grad is not None for value in built.model.parameters())


def test_slope_of_the_loss_pulls_errors_of_winners_down_and_of_losers_up(tiny_pipeline, tmp_path):
    built = trainer(tiny_pipeline("sd"), tmp_path, beta=BETA)
    batch = batch_of(built, [0, 1, 2, 3])
    built.model.train()
    before = built.scores(built.model, batch)
    losses.dpo(before, beta=BETA).mean().backward()
    with torch.no_grad():
        for value in built.model.parameters():
            if value.grad is not None:
                value -= 1e-2 * value.grad
        after = built.scores(built.model, batch)
    assert (after.chosen - after.rejected).mean() > (before.chosen - before.rejected).mean()


# Previous iterate and other references


def saved_adapter(pipe: Any, folder: Any) -> str:
    """An adapter that is not the base, in a file."""
    built = trainer(pipe, folder)
    shake(built, seed=3)
    built.save_model(str(folder / "out"))
    return str(folder / "out")


def with_adapter(pipe: Any, path: str) -> Any:
    pipe.load_lora_weights(path)
    return pipe


def test_training_that_goes_on_from_an_adapter_refers_to_its_copy(tiny_pipeline, tmp_path):
    start = saved_adapter(tiny_pipeline("sd"), tmp_path / "start")
    built = trainer(tiny_pipeline("sd"), tmp_path, peft=False, start_adapter=start)
    built.model.train()
    at_start = built.scores(built.model, batch_of(built, [0, 1]))
    assert torch.equal(at_start.chosen, at_start.ref_chosen) and at_start.last_chosen is None
    assert at_start.chosen.requires_grad and not at_start.ref_chosen.requires_grad
    shake(built)
    pipes = [plain(built, "sd", tiny_pipeline, tmp_path), with_adapter(tiny_pipeline("sd"), start)]
    assert_scores(scored(built, [0, 1]), *by_hand.errors(pipes, pairs().select([0, 1]), Settings()))


def test_inpo_compares_with_the_adapter_and_refers_to_the_base(tiny_pipeline, tmp_path):
    start = saved_adapter(tiny_pipeline("sd"), tmp_path / "start")
    options = {"loss": "inpo", "eta": 0.5, "tau": 0.2, "start_adapter": start}
    built = trainer(tiny_pipeline("sd"), tmp_path, peft=False, **options)
    built.model.train()
    at_start = built.scores(built.model, batch_of(built, [0, 1]))
    assert torch.equal(at_start.chosen, at_start.last_chosen) and not at_start.last_chosen.requires_grad
    assert not torch.allclose(at_start.chosen, at_start.ref_chosen, atol=1e-4)
    assert built.start_gap(at_start).max() == 0, "the start check compares with the previous iterate"
    shake(built)
    pipes = [plain(built, "sd", tiny_pipeline, tmp_path), tiny_pipeline("sd"), with_adapter(tiny_pipeline("sd"), start)]
    policy, reference, last = by_hand.errors(pipes, pairs().select([0, 1]), Settings())
    scores = scored(built, [0, 1])
    assert_scores(scores, policy, reference, last)
    for row, loss in enumerate(built.loss_terms(scores, {})["inpo"].tolist()):
        of_policy, of_reference, of_last = (
            -0.5 * (errors["chosen"][row] - errors["rejected"][row]) for errors in (policy, reference, last)
        )
        expected = (of_policy - 0.4 * of_reference - 0.6 * of_last - 1) ** 2
        assert loss == pytest.approx(expected, rel=1e-5)


def test_inpo_trains_on_from_an_adapter(tiny_pipeline, tmp_path):
    start = saved_adapter(tiny_pipeline("sd"), tmp_path / "start")
    options = {"loss": "inpo", "eta": 0.5, "tau": 0.2, "start_adapter": start, "max_steps": 1}
    built = trainer(tiny_pipeline("sd"), tmp_path, peft=False, **options)
    built.train()
    assert built.state.global_step == 1


@pytest.mark.parametrize("by_path", [True, False])
@pytest.mark.parametrize("lora", [True, False])
def test_another_reference_is_used(lora, by_path, tiny_pipeline, tmp_path):
    other = tiny_pipeline("sd")
    with torch.no_grad():
        other.unet.conv_out.weight *= 1.5
    given: dict[str, Any] = {"ref": other}
    if by_path:
        other.save_pretrained(tmp_path / "other")
        given = {"ref_model_name_or_path": str(tmp_path / "other")}
    built = trainer(tiny_pipeline("sd"), tmp_path, peft=lora, max_steps=1, **given)
    expected = by_hand.errors([tiny_pipeline("sd"), other], pairs().select([0, 1]), Settings())
    assert_scores(scored(built, [0, 1]), *expected)
    built.train()  # the start check lets it pass
    assert not any(value.requires_grad for value in built.reference.parameters())


# What a row meets


def columns(scores: PairScores) -> Tensor:
    return torch.stack([scores.chosen, scores.rejected, scores.ref_chosen, scores.ref_rejected], dim=1)


def test_a_row_meets_the_same_in_any_company(tiny_pipeline, tmp_path):
    built = trainer(tiny_pipeline("sd"), tmp_path, caption_dropout=0.5, random_flip="image")
    shake(built)
    whole = columns(scored(built, [0, 1, 2, 3, 4]))
    torch.manual_seed(1)
    for rows in ([3], [4, 0], [2, 2, 1]):
        torch.testing.assert_close(columns(scored(built, rows)), whole[rows], rtol=1e-5, atol=1e-6)
    assert not torch.allclose(columns(scored(built, [0, 1], epoch=1.0)), whole[:2], atol=1e-3)
    # Within an epoch, whatever its fraction; a hair below the next one is the next one.
    torch.testing.assert_close(columns(scored(built, [0, 1], epoch=0.99)), whole[:2], rtol=1e-5, atol=1e-6)
    later = columns(scored(built, [0, 1], epoch=1 - 1e-12))
    assert torch.equal(later, columns(scored(built, [0, 1], epoch=1.5)))


def test_noise_and_time_of_a_pair_are_one_and_those_of_rows_are_not():
    draws = draw((0, "train", 0), range(200), (2, 3, 3))
    assert torch.equal(draws.noise[:, 0], draws.noise[:, 1])
    assert not torch.equal(draws.latent[:, 0], draws.latent[:, 1])
    assert len(set(draws.time.tolist())) == 200
    alone = draw((0, "train", 0), range(200), (2, 3, 3), shared=False)
    assert torch.equal(alone.time, draws.time) and not torch.equal(alone.noise[:, 0], alone.noise[:, 1])
    for values, deviation in ((alone.noise, 1.0), (alone.latent, 1.0)):
        assert values.mean().abs() < 0.05 and (values.std() - deviation).abs() < 0.05
    for uniform in (draws.time, draws.drop, draws.flip.flatten()):
        assert 0 <= uniform.min() and uniform.max() < 1 and (uniform.mean() - 0.5).abs() < 0.06
    # Nothing that a row meets says anything of the rest.
    table = torch.stack([draws.time, draws.drop, *draws.flip.T, draws.noise[:, 0, 0, 0, 0], draws.latent[:, 0, 0, 0, 0],
                         draws.latent[:, 1, 0, 0, 0]])  # fmt: skip
    assert (torch.corrcoef(table) - torch.eye(len(table))).abs().max() < 0.25
    for other in ((1, "train", 0), (0, "eval", 0), (0, "train", 1)):
        assert not torch.equal(draw(other, range(3), (2, 3, 3)).noise, draws.noise[:3])


def test_training_meets_new_noise_in_every_epoch_and_every_row_once(tiny_pipeline, tmp_path, monkeypatch):
    built = trainer(
        tiny_pipeline("sd"), tmp_path, rows=pairs(6), max_steps=-1, num_train_epochs=3, gradient_accumulation_steps=2,
        per_device_train_batch_size=2,
    )  # fmt: skip
    seen: list[tuple[int, int]] = []
    module = __import__("llmalign.diffusion.trainer", fromlist=["draw"])

    def record(key: tuple, rows: list[int], *args: Any, **kwargs: Any) -> Any:
        seen.extend((key[2], row) for row in rows)
        return draw(key, rows, *args, **kwargs)

    monkeypatch.setattr(module, "draw", record)
    built.train()
    assert sorted(seen) == [(epoch, row) for epoch in range(3) for row in range(6)]


# Evaluation


@pytest.mark.parametrize("kind", ["sd", "sd3"])
def test_evaluation_is_the_mean_over_a_fixed_grid_by_hand(kind, tiny_pipeline, tmp_path):
    held_out = pairs(3, seed=1)
    built = trainer(
        tiny_pipeline(kind), tmp_path, evaluation=held_out, beta=BETA, eval_timesteps=4, caption_dropout=0.9,
        random_flip="image",
    )  # fmt: skip
    shake(built)
    measured = built.evaluate()
    pipes = [plain(built, kind, tiny_pipeline, tmp_path), tiny_pipeline(kind)]
    policy, reference = by_hand.grid_errors(pipes, held_out, 4)
    for name, errors, side in (
        ("chosen", policy, "chosen"), ("rejected", policy, "rejected"), ("ref_chosen", reference, "chosen"),
        ("ref_rejected", reference, "rejected"),
    ):  # fmt: skip
        assert measured[f"eval_error/{name}"] == pytest.approx(sum(errors[side]) / 3, rel=2e-5), name
    margins = [
        -BETA / 2 * (policy["chosen"][i] - policy["rejected"][i] - reference["chosen"][i] + reference["rejected"][i])
        for i in range(3)
    ]
    assert measured["eval_loss"] == pytest.approx(sum(math.log1p(math.exp(-m)) for m in margins) / 3, rel=1e-5)
    assert measured["eval_rewards/margins"] == pytest.approx(sum(margins) / 3, rel=1e-3, abs=1e-5)
    assert measured["eval_rewards/accuracies"] == pytest.approx(sum(m > 0 for m in margins) / 3)


def test_evaluation_does_not_depend_on_batches_chance_or_training(tiny_pipeline, tmp_path):
    held_out = pairs(5, seed=1)
    built = trainer(
        tiny_pipeline("sd"), tmp_path, evaluation={"a": held_out, "b": held_out}, random_flip="image", beta=BETA,
        eval_timesteps=3,
    )  # fmt: skip
    shake(built)
    first = built.evaluate()
    torch.manual_seed(9)
    built.state.epoch = 3.7
    built.args.per_device_eval_batch_size = 2
    second = built.evaluate()
    compared = [name for name in first if "rewards/" in name or "error/" in name or name.endswith("_loss")]
    assert len(compared) > 20
    for name in compared:
        assert second[name] == pytest.approx(first[name], rel=1e-5, abs=1e-6), name
        assert first[name.replace("eval_a_", "eval_b_")] == first[name], name
