"""D3PO and online PSO: what a batch costs and what a round draws, by hand; preferences from rewards."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers import EulerAncestralDiscreteScheduler
from torch import Tensor

from llmalign.diffusion.online import D3POTrainer
from llmalign.diffusion.rollouts import row_noise
from llmalign.errors import UserError
from tests.diffusion.drawing import (
    CAPTIONS,
    SHAPE,
    blank,
    bright,
    captions,
    dark,
    ddim_logp,
    ddim_mean_std,
    guided_noise,
    online,
    policy_of,
    red,
)
from tests.diffusion.test_trainer import batch_of, shake
from tests.diffusion.vectors import ALPHAS

SCHEDULE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}


def losses_of(built: D3POTrainer, places: list[int]) -> Tensor:
    built.model.train()
    inputs = batch_of(built, places)
    return built.loss_terms(built.scores(built.model, inputs), inputs)["d3po"]


def rows_of(built: D3POTrainer, places: list[int]) -> list[tuple[int, int, str]]:
    """Pair, step and caption of rows."""
    rows = [built.train_dataset[place] for place in places]
    return [(row["pair"], row["step"], built.captions[row["caption_id"]]) for row in rows]


@torch.no_grad()
def brightness_by_hand(pipe: Any, latents: Tensor) -> float:
    picture = pipe.vae.decode(latents[None] / pipe.vae.config.scaling_factor).sample[0]
    return ((picture / 2 + 0.5).clamp(0, 1) * 255).round().mean().item()


def gradients(model: torch.nn.Module) -> dict[str, Tensor]:
    """Of the adapter's weights, by names that do not depend on the adapter's."""
    found = {name: value.grad for name, value in model.named_parameters() if value.grad is not None}
    return {
        name.replace(".default_0.", ".").replace(".default.", ".").removeprefix("network."): value
        for name, value in found.items()
    }


# What a batch costs


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"reference": "previous"},
        *(pytest.param(slow, marks=pytest.mark.slow) for slow in ({"ratio_clip": None}, {"guidance_scale": 1.0})),
    ],
    ids=lambda changes: "-".join(changes) or "default",
)
def test_loss_and_gradient_by_hand(changes, tiny_pipeline, tmp_path):
    built = online(tiny_pipeline("sd"), tmp_path, beta=2.0, **changes)
    shake(built, seed=3)
    drawer = policy_of(built, tiny_pipeline("sd"), tmp_path / "drawer")
    drawn = built._drawn(0)
    shake(built, seed=4)
    policy, base = policy_of(built, tiny_pipeline("sd"), tmp_path / "policy"), tiny_pipeline("sd")
    reference = drawer if changes.get("reference") == "previous" else base
    guidance, clip = built.args.guidance_scale, built.args.ratio_clip
    places = list(range(6))
    expected, outside = [], 0
    for name, value in policy.unet.named_parameters():
        value.requires_grad_("lora" in name)
    for pair, step, caption in rows_of(built, places):
        ratios, rewards = [], []
        for side in range(2):
            path = drawn.latents[:, pair, side]
            now, following = path[step][None], path[step + 1][None]
            with torch.no_grad():
                old = ddim_logp(reference, now, following, step, caption, guidance)
            ratio = (ddim_logp(policy, now, following, step, caption, guidance) - old).exp()
            outside += not 0.9 <= ratio <= 1.1
            ratios.append(ratio if clip is None else ratio.clamp(1 - clip, 1 + clip))
            rewards.append(brightness_by_hand(base, path[-1]))
        assert rewards[0] != rewards[1]
        sign = 1 if rewards[0] > rewards[1] else -1
        expected.append(F.softplus(-2.0 * sign * (ratios[0].log() - ratios[1].log())))
    assert 0 < outside < 12, "some ratios are clipped and some are not"
    found = losses_of(built, places)
    torch.testing.assert_close(found, torch.stack(expected).float(), rtol=2e-4, atol=2e-5)
    found.mean().backward()
    torch.stack(expected).mean().backward()
    ours, theirs = gradients(built.model), gradients(policy.unet)
    assert ours.keys() == theirs.keys() and len(ours) > 4
    largest = max(value.abs().max() for value in theirs.values())
    assert largest > 1e-4
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=2e-3, atol=2e-3 * largest.item(), msg=name)


@pytest.mark.parametrize("share", [True, False])
def test_what_a_round_draws_by_hand(share, tiny_pipeline, tmp_path):
    built = online(tiny_pipeline("sd"), tmp_path, share_initial=share)
    shake(built)
    policy = policy_of(built, tiny_pipeline("sd"), tmp_path / "policy")
    drawn = built._drawn(1)
    assert drawn.latents.shape == (5, 4, 2, *SHAPE) and drawn.log_probs.shape == (4, 4, 2)
    captioned = [built.captions[caption] for caption in built.train_dataset.caption_ids(1)]
    with torch.no_grad():
        for pair, side in ((0, 0), (2, 1)):
            path = drawn.latents[:, pair, side]
            initial = row_noise((42, "initial", 1, pair), [0 if share else side], SHAPE)[0]
            assert torch.equal(path[0], initial)
            for step in range(4):
                mean, std = ddim_mean_std(policy, path[step][None], step, captioned[pair], 3.0)
                noise = row_noise((42, "step", 1, step, pair), [side], SHAPE)
                torch.testing.assert_close(path[step + 1][None], (mean + std * noise).float(), rtol=1e-4, atol=1e-4)
                logp = ddim_logp(policy, path[step][None], path[step + 1][None], step, captioned[pair], 3.0)
                assert drawn.log_probs[step, pair, side].item() == pytest.approx(logp.item(), abs=2e-3)
            expected = brightness_by_hand(policy, path[-1])
            assert drawn.rewards[pair, side, 0].item() == pytest.approx(expected, abs=0.02)
    first, second = drawn.latents[0].unbind(dim=1)
    assert torch.equal(first, second) == share
    ends = drawn.latents[-1].flatten(0, 1).flatten(1)
    assert torch.cdist(ends, ends).add(torch.eye(8) * 9).min() > 0.1, "no two pictures are the same"
    assert not torch.equal(built._draw_round(0).latents[0], drawn.latents[0])


def euler_logp(pipe: Any, noisy: Tensor, following: Tensor, step: int, caption: str) -> Tensor:
    """Of Euler-ancestral steps at 999, 749, 499, 249, as PSO has them for SDXL-Turbo."""
    times = [999, 749, 499, 249]
    sigma, then = (((1 - ALPHAS[t]) / ALPHAS[t]).sqrt() for t in times[step : step + 2])
    up = (then**2 * (sigma**2 - then**2) / sigma**2).sqrt()
    down = (then**2 - up**2).sqrt()
    noise = guided_noise(pipe, (noisy / (sigma**2 + 1).sqrt()).float(), times[step], caption, 1.0).double()
    mean = noisy.double() + noise * (down - sigma)
    return torch.distributions.Normal(mean, up).log_prob(following.double()).mean()


def test_pso_leaves_the_last_step_out_and_costs_what_it_should(tiny_pipeline, tmp_path):
    pipe = tiny_pipeline("sd")
    pipe.scheduler = EulerAncestralDiscreteScheduler(**SCHEDULE, timestep_spacing="trailing")
    built = online(pipe, tmp_path, pso=True)
    assert built.sampler.timesteps.tolist() == [999, 749, 499, 249]
    assert built.train_dataset.per_round == 4 * 3
    assert {built.train_dataset[place]["step"] for place in range(24)} == {0, 1, 2}
    drawn = built._drawn(0)
    assert drawn.log_probs[3].isnan().all() and not drawn.log_probs[:3].isnan().any()
    assert not torch.equal(drawn.latents[0, :, 0], drawn.latents[0, :, 1]), "PSO's pairs do not share their start"
    shake(built)
    policy, base = policy_of(built, tiny_pipeline("sd"), tmp_path / "policy"), tiny_pipeline("sd")
    expected = []
    with torch.no_grad():
        for pair, step, caption in rows_of(built, list(range(5))):
            ratios = []
            for side in range(2):
                now, following = drawn.latents[step : step + 2, pair, side, None]
                new, old = (euler_logp(pipe, now, following, step, caption) for pipe in (policy, base))
                ratios.append((new - old).clamp(math.log(0.9), math.log(1.1)))
            sign = drawn.preference[pair].item()
            better = drawn.rewards[pair, 0, 0] > drawn.rewards[pair, 1, 0]
            assert sign == (1 if better else -1)
            expected.append(F.softplus(-50.0 * sign * (ratios[0] - ratios[1])).item())
        found = losses_of(built, list(range(5))).tolist()
    assert max(expected) - min(expected) > 0.05
    assert found == pytest.approx(expected, rel=5e-3, abs=2e-3)


def test_at_the_start_of_a_round_the_previous_policy_is_the_policy(tiny_pipeline, tmp_path):
    built = online(tiny_pipeline("sd"), tmp_path, reference="previous", ratio_clip=None)
    shake(built)
    built.model.train()
    with torch.no_grad():
        scores = built.scores(built.model, batch_of(built, list(range(16))))
        assert built.start_gap(scores).max() < 1e-4
        shake(built, seed=5)
        assert built.start_gap(built.scores(built.model, batch_of(built, [0, 1]))).max() > 1e-2


@pytest.mark.parametrize("changes", [{}, {"reference": "previous"}, {"pso": True}], ids=str)
def test_a_run_starts_at_log_2_and_logs_what_it_drew(changes, tiny_pipeline, tmp_path):
    built = online(tiny_pipeline("sd"), tmp_path, **changes)
    built.train()
    logs = [entry for entry in built.state.log_history if "loss" in entry]
    assert [entry["step"] for entry in logs] == [1, 2]
    assert logs[0]["loss"] == pytest.approx(math.log(2), abs=1e-4) and logs[0]["grad_norm"] > 0
    assert logs[0]["ratios/clipped"] == 0 and logs[1]["pairs/preferred"] == 1
    assert logs[1]["reward"] == pytest.approx(built._round.rewards.mean().item(), rel=1e-5)


def test_half_precision_starts_where_the_reference_is(tiny_pipeline, tmp_path):
    for changes in ({}, {"reference": "previous"}):
        built = online(tiny_pipeline("sd"), tmp_path / str(len(changes)), bf16=True, use_cpu=True, **changes)
        built.train()
        assert built.state.global_step == 2
    split = built.split_gap(built.model, batch_of(built, [0, 1, 2]))
    assert 0 <= split < 0.5


def test_the_gap_of_a_split_batch_is_seen(tiny_pipeline, tmp_path, monkeypatch):
    built = online(tiny_pipeline("sd"), tmp_path)
    batch = batch_of(built, [0, 1, 2])
    assert built.split_gap(built.model, batch) < 1e-4
    whole = built._logps
    monkeypatch.setattr(
        built, "_logps", lambda model, steps, *rest: whole(model, steps, *rest) + 0.25 * (len(steps) > 2)
    )
    assert built.split_gap(built.model, batch) == pytest.approx(0.25, abs=1e-4)


# Preferences


def test_ties_have_loss_log_2_and_no_gradient(tiny_pipeline, tmp_path):
    built = online(tiny_pipeline("sd"), tmp_path, rewards=(blank,))
    shake(built)
    found = losses_of(built, [0, 1, 2])
    assert found.tolist() == pytest.approx([math.log(2)] * 3, rel=1e-6)
    found.sum().backward()
    assert all(value.abs().max() == 0 for value in gradients(built.model).values())


def test_several_rewards(tiny_pipeline, tmp_path):
    options = {"pairs_per_round": 16, "sampling_steps": 1, "guidance_scale": 1.0}
    both = online(tiny_pipeline("sd"), tmp_path / "a", rewards=(bright, red), **options)._drawn(0)
    assert both.rewards.shape == (16, 2, 2)
    signs = torch.sign(both.rewards[:, 0] - both.rewards[:, 1])
    agreeing = signs[:, 0] == signs[:, 1]
    assert 0 < agreeing.sum() < 16
    assert torch.equal(both.preference[agreeing], signs[agreeing, 0].long())
    assert (both.preference[~agreeing] == 0).all()
    opposed = online(tiny_pipeline("sd"), tmp_path / "b", rewards=(bright, dark), **options)
    assert (opposed._drawn(0).preference == 0).all()
    opposed.args.combine_rewards = "random"
    rewards = opposed._drawn(0).rewards
    brighter = torch.sign(rewards[:, 0, 0] - rewards[:, 1, 0]).long()
    took_first = opposed._preference(0, rewards) == brighter
    assert 3 < took_first.sum() < 13 and (opposed._preference(0, rewards) != 0).all()
    assert torch.equal(opposed._preference(0, rewards) == brighter, took_first)
    assert not torch.equal(opposed._preference(1, rewards) == brighter, took_first)


def picky(prompts: list[str], images: list[Any], **columns: Any) -> list[float | None]:
    values = zip(prompts, bright(prompts, images), strict=True)
    return [None if prompt == CAPTIONS[2] else value for prompt, value in values]


def test_pairs_without_a_reward_have_no_preference_and_stay_out_of_the_mean(tiny_pipeline, tmp_path):
    rows = captions(4)
    built = online(tiny_pipeline("sd"), tmp_path, rewards=(picky,), rows=rows, evaluation=rows, max_steps=1)
    drawn = built._drawn(0)
    missing = torch.tensor([built.captions[caption] == CAPTIONS[2] for caption in built.train_dataset.caption_ids(0)])
    assert missing.sum() == 1 and torch.equal(drawn.preference == 0, missing)
    built.train()
    (entry,) = [entry for entry in built.state.log_history if "loss" in entry]
    assert entry["pairs/preferred"] == 0.75
    assert entry["reward"] == pytest.approx(drawn.rewards[~missing].mean().item(), rel=1e-5)
    measured = built.evaluate()
    assert measured["eval_rows"] == 4 and measured["eval_reward"] > 0


def broken(prompts: list[str], images: list[Any], **columns: Any) -> list[float]:
    raise RuntimeError("no scorer here")


@pytest.mark.parametrize("rewards", [(broken,), (bright, broken)])
def test_a_reward_that_always_fails_stops_the_run_with_one_sentence(rewards, tiny_pipeline, tmp_path):
    built = online(tiny_pipeline("sd"), tmp_path, rewards=rewards)
    with pytest.raises(UserError, match="broken gave no reward for any of a round's pictures: .*no scorer") as caught:
        built.train()
    assert "\n" not in str(caught.value)
