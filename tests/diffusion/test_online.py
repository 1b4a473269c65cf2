"""D3PO and online PSO: what a batch costs by hand, preferences from rewards, what is drawn, evaluation, resuming."""

import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import EulerAncestralDiscreteScheduler
from safetensors.torch import load_file
from torch import Tensor

from llmalign.diffusion.denoiser import LORA_FILE
from llmalign.diffusion.online import D3POConfig, D3POTrainer, PSOConfig
from llmalign.diffusion.rollouts import row_noise
from llmalign.diffusion.rounds import FILE
from llmalign.errors import UserError
from tests.diffusion.drawing import (
    CAPTIONS,
    SHAPE,
    blank,
    bright,
    captions,
    ddim_logp,
    ddim_mean_std,
    guided_noise,
    online,
    policy_of,
    red,
)
from tests.diffusion.test_trainer import shake
from tests.diffusion.vectors import ALPHAS

SCHEDULE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}


def batch_of(built: D3POTrainer, places: list[int]) -> dict[str, Any]:
    return built.data_collator([built.train_dataset[place] for place in places])


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
        {"ratio_clip": None},
        {"reference": "previous"},
        {"guidance_scale": 1.0},
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


def dark(prompts: list[str], images: list[Any], **columns: Any) -> list[float]:
    return [-value for value in bright(prompts, images)]


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


# What is drawn


def test_what_is_drawn_does_not_depend_on_batches_or_chance(tiny_pipeline, tmp_path):
    built = online(tiny_pipeline("sd"), tmp_path, pairs_per_round=5, per_device_train_batch_size=20)
    shake(built)
    rounds = []
    for size in (16, 2, 6, 1):
        built.args.sampling_batch_size = size
        torch.manual_seed(size)
        rounds.append(built._draw_round(1))
    for other in rounds[1:]:
        torch.testing.assert_close(other.latents, rounds[0].latents, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(other.rewards, rounds[0].rewards, rtol=0, atol=0.1)
        torch.testing.assert_close(other.log_probs, rounds[0].log_probs, rtol=1e-4, atol=1e-3)


def test_shares_of_processes_make_the_round_of_one(tiny_pipeline, tmp_path, monkeypatch):
    built = online(tiny_pipeline("sd"), tmp_path, pairs_per_round=5, per_device_train_batch_size=20)
    whole = built._draw_round(0)
    kind = type(built.accelerator)
    monkeypatch.setattr(kind, "num_processes", property(lambda self: 3))
    shares: list[Any] = []
    for rank in range(3):
        monkeypatch.setattr(kind, "process_index", property(lambda self, rank=rank: rank))
        monkeypatch.setattr("llmalign.diffusion.online.gather_object", lambda given: shares.extend(given) or given)
        built._draw_round(0)
    assert [len(rewards) for _, _, rewards in shares] == [2, 2, 1]
    monkeypatch.setattr("llmalign.diffusion.online.gather_object", lambda given: shares)
    drawn = built._draw_round(0)
    torch.testing.assert_close(drawn.latents, whole.latents, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(drawn.log_probs, whole.log_probs, rtol=1e-4, atol=1e-3)
    assert torch.equal(drawn.preference, whole.preference)


def test_drawing_leaves_the_network_in_its_mode_and_adapter(tiny_pipeline, tmp_path):
    built = online(tiny_pipeline("sd"), tmp_path)
    for training in (True, False):
        built.model.train(training)
        built._draw_round(0)
        assert built.model.training is training
    assert built.model._in_use == "default"


@pytest.mark.slow
def test_the_reward_rises(tiny_pipeline, tmp_path):
    built = online(
        tiny_pipeline("sd"), tmp_path, peft=False, rounds=12, pairs_per_round=16, per_device_train_batch_size=32,
        per_device_eval_batch_size=24, guidance_scale=1.0, evaluation=captions(24), learning_rate=3e-3,
        lr_scheduler_type="constant",
    )  # fmt: skip
    before = built.evaluate()["eval_reward"]
    built.train()
    assert built.evaluate()["eval_reward"] > before + 1
    losses = [entry["loss"] for entry in built.state.log_history if "loss" in entry]
    assert max(abs(loss - math.log(2)) for loss in losses) < 0.05, "while the loss stays where it was"


# Evaluation


def test_evaluation_draws_the_same_pictures_every_time(tiny_pipeline, tmp_path):
    seen: list[dict[str, Any]] = []

    def looking(prompts: list[str], images: list[Any], **columns: Any) -> list[float]:
        for prompt, image in zip(prompts, images, strict=True):
            seen.append({"prompt": prompt, "picture": np.asarray(image)})
        return bright(prompts, images)

    held_out = captions(5, first=30)
    built = online(tiny_pipeline("sd"), tmp_path, rewards=(looking,), evaluation={"a": held_out, "b": held_out})
    first = built.evaluate()
    assert [entry["prompt"] for entry in seen] == 2 * [held_out["caption"][place] for place in range(5)]
    torch.manual_seed(7)
    built.args.per_device_eval_batch_size = 2
    built.state.global_step = 9
    second = built.evaluate()
    pictures = [entry["picture"].astype(int) for entry in seen]
    for other in (pictures[5:10], pictures[10:15], pictures[15:]):
        assert max(np.abs(one - two).max() for one, two in zip(pictures[:5], other, strict=True)) <= 1
    assert all(np.abs(one - two).max() > 1 for one, two in zip(pictures[:4], pictures[1:5], strict=True))
    expected = np.mean([bright([], [picture])[0] for picture in pictures[:5]])
    assert first["eval_a_reward"] == pytest.approx(expected, rel=1e-5)
    assert second["eval_b_reward"] == pytest.approx(expected, rel=1e-3)
    shake(built)
    assert built.evaluate()["eval_a_reward"] != pytest.approx(expected, abs=0.1)


def test_the_best_checkpoint_is_the_one_of_the_highest_reward(tiny_pipeline, tmp_path):
    built = online(
        tiny_pipeline("sd"), tmp_path, rounds=3, evaluation=captions(2), load_best_model_at_end=True,
        eval_strategy="steps", eval_steps=1, save_strategy="steps", save_steps=1,
    )  # fmt: skip
    built.train()
    rewards = {entry["step"]: entry["eval_reward"] for entry in built.state.log_history if "eval_reward" in entry}
    best = max(rewards, key=lambda step: rewards[step])
    assert built.state.best_model_checkpoint.endswith(f"checkpoint-{best}") and len(set(rewards.values())) == 3
    assert built.evaluate()["eval_reward"] == pytest.approx(rewards[best], rel=1e-6)


# Resuming


@pytest.mark.parametrize("changes", [{}, {"reference": "previous", "peft": False}], ids=["lora", "previous-full"])
def test_a_resumed_run_ends_at_the_same_bits(changes, tiny_pipeline, tmp_path, monkeypatch):
    drawn: list[int] = []
    draw = D3POTrainer._draw_round
    monkeypatch.setattr(D3POTrainer, "_draw_round", lambda self, number: drawn.append(number) or draw(self, number))
    options = {"rounds": 3, "per_device_train_batch_size": 8, "save_strategy": "steps", "save_steps": 1, **changes}
    whole = online(tiny_pipeline("sd"), tmp_path / "whole", **options)
    whole.train()
    assert drawn == [0, 1, 2]
    weights = LORA_FILE if whole.model.has_adapters else "unet/diffusion_pytorch_model.safetensors"
    folder = tmp_path / "whole" / "out"
    expected = load_file(folder / "checkpoint-6" / weights)
    for step, redrawn in ((3, [2]), (4, [2])):
        drawn.clear()
        built = online(tiny_pipeline("sd"), tmp_path / str(step), **options)
        built.train(resume_from_checkpoint=str(folder / f"checkpoint-{step}"))
        assert drawn == redrawn, "a round that a checkpoint holds is not drawn again"
        found = load_file(tmp_path / str(step) / "out" / "checkpoint-6" / weights)
        assert found.keys() == expected.keys()
        assert not [name for name, value in expected.items() if not torch.equal(found[name], value)], step
    assert any(not torch.equal(value, load_file(folder / "checkpoint-4" / weights)[k]) for k, value in expected.items())


def test_the_final_folder_holds_no_round(tiny_pipeline, tmp_path):
    built = online(tiny_pipeline("sd"), tmp_path, save_strategy="steps", save_steps=1)
    built.train()
    built.save_model()
    assert (tmp_path / "out" / "checkpoint-1" / FILE).is_file() and not (tmp_path / "out" / FILE).exists()


# Other architectures


@pytest.mark.parametrize("kind", ["sd2", "sdxl", "sd3", "flux"])
def test_other_architectures_start_at_log_2(kind, tiny_pipeline, tmp_path):
    built = online(tiny_pipeline(kind), tmp_path, resolution=8, guidance_scale=2.0, max_steps=1)
    built.train()
    (entry,) = [entry for entry in built.state.log_history if "loss" in entry]
    assert entry["loss"] == pytest.approx(math.log(2), abs=1e-4) and entry["grad_norm"] > 0
    assert entry["pairs/preferred"] == 1


# What is refused


@pytest.mark.parametrize(
    "given, message",
    [
        ({"reward_funcs": None}, "reward_funcs is empty"),
        ({"reward_funcs": []}, "reward_funcs is empty"),
        *(({name: 0}, f"{name} must be a positive finite number, got 0") for name in (
            "rounds", "pairs_per_round", "inner_epochs", "sampling_steps", "noise_level", "sampling_batch_size", "beta",
        )),
        ({"beta": math.nan}, "beta must be a positive finite number, got nan"),
        ({"timestep_fraction": 0.0}, r"timestep_fraction must be in \(0, 1\], got 0.0"),
        ({"timestep_fraction": 1.5}, r"timestep_fraction must be in \(0, 1\], got 1.5"),
        ({"sampling_eta": 0.0}, r"sampling_eta must be in \(0, 1\], got 0.0"),
        ({"sampling_eta": 1.1}, r"sampling_eta must be in \(0, 1\], got 1.1"),
        ({"sampler": "euler"}, "sampler must be one of ddim, euler_ancestral, consistency, flow_sde, got 'euler'"),
        ({"sampler": "consistency", "sampling_eta": 0.5}, "sampling_eta=0.5 is not honoured .* to sampler: ddim"),
        ({"sampler": "ddim", "noise_level": 0.5}, "noise_level=0.5 is not honoured .* belongs to sampler: flow_sde"),
        ({"guidance_scale": 0.5}, r"guidance_scale must be 1 \(off\) or more, got 0.5"),
        ({"reference": "base"}, "reference must be initial or previous, got 'base'"),
        ({"combine_rewards": "sum"}, "combine_rewards must be pareto or random, got 'sum'"),
        ({"ratio_clip": 1.0}, r"ratio_clip must be in \(0, 1\), or null, got 1.0"),
        ({"ratio_clip": 0.0}, r"ratio_clip must be in \(0, 1\), or null, got 0.0"),
        ({"train_sampling_strategy": "random"}, "train_sampling_strategy='random' is not honoured by .*: the order"),
        ({"num_train_epochs": 2.0}, "num_train_epochs=2.0 is not honoured by .*: rounds and inner_epochs say"),
        ({"winner_guard": "warn"}, "winner_guard='warn' is not honoured by .*: there are no denoising errors"),
    ],
    ids=lambda value: "-".join(map(str, value)) if isinstance(value, dict) else "",
)  # fmt: skip
@pytest.mark.parametrize("config", [D3POConfig, PSOConfig])
def test_configs_refuse_what_makes_no_sense(config, given, message, tmp_path):
    if config is PSOConfig and "noise_level" in given and "sampler" not in given:
        given = {"sampler": None, **given}
    if config is PSOConfig and given.get("sampling_eta"):
        given = {"sampler": "consistency" if "sampler" in given else "ddim", **given}
    with pytest.raises(UserError, match=message) as caught:
        config(output_dir=str(tmp_path), **{"reward_funcs": ["brightness"], **given})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "given, message",
    [
        ({"per_device_train_batch_size": 3}, r"a round has 16 rows .* an optimizer step takes 3: make the first"),
        ({"gradient_accumulation_steps": 2}, "a round has 16 rows .* an optimizer step takes 32"),
        ({"max_steps": 3}, "max_steps is 3 and the rounds have 2 optimizer steps, .* raise rounds"),
        ({"sampler": "flow_sde"}, "sampler: flow_sde does not belong to this pipeline's schedule; use ddim,"),
        ({"sampling_steps": 2000}, "a sampler takes 1 to 1000 steps, got 2000"),
        ({"evaluation": {"train": captions(1)}}, "an evaluation set cannot be called `train`"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_trainers_refuse_what_does_not_fit(given, message, tiny_pipeline, tmp_path):
    with pytest.raises(UserError, match=message) as caught:
        online(tiny_pipeline("sd"), tmp_path, **given)
    assert "\n" not in str(caught.value)


def test_every_process_draws_a_pair(tiny_pipeline, tmp_path, monkeypatch):
    monkeypatch.setattr(D3POConfig, "world_size", property(lambda self: 8))
    with pytest.raises(UserError, match="pairs_per_round is 4 and there are 8 processes: each draws one pair or more"):
        online(tiny_pipeline("sd"), tmp_path, per_device_train_batch_size=2)


def test_steps_may_be_fewer_than_a_sampler_with_noise_at_timestep_0(tiny_pipeline, tmp_path):
    pipe = tiny_pipeline("sd")
    pipe.scheduler.register_to_config(steps_offset=0)
    with pytest.raises(UserError, match="DDIM would end at timestep 0"):
        online(pipe, tmp_path)
