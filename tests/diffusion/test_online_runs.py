"""Runs of D3PO and online PSO: what rounds draw, evaluation, resuming, other architectures, and what is refused."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from llmalign.diffusion.denoiser import LORA_FILE
from llmalign.diffusion.online import D3POConfig, D3POTrainer, PSOConfig
from llmalign.diffusion.rounds import FILE
from llmalign.errors import UserError
from tests.diffusion.drawing import bright, captions, dark, online
from tests.diffusion.test_trainer import shake

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
@pytest.mark.parametrize("reward", [bright, dark])
def test_the_reward_rises_while_the_loss_stays(reward, tiny_pipeline, tmp_path):
    built = online(
        tiny_pipeline("sd"), tmp_path, rewards=(reward,), peft=False, rounds=8, pairs_per_round=64,
        sampling_batch_size=128, per_device_train_batch_size=64, per_device_eval_batch_size=64, guidance_scale=1.0,
        evaluation=captions(64), learning_rate=1e-3, lr_scheduler_type="constant",
    )  # fmt: skip
    before = built.evaluate()["eval_reward"]
    built.train()
    # By about as much as the pictures of the start differ, 2.7 of 255.
    assert built.evaluate()["eval_reward"] > before + 1.5
    losses = [entry["loss"] for entry in built.state.log_history if "loss" in entry]
    assert max(abs(loss - math.log(2)) for loss in losses) < 0.05


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


@pytest.mark.parametrize(
    "changes",
    [{}, pytest.param({"reference": "previous", "peft": False}, marks=pytest.mark.slow)],
    ids=["lora", "previous-full"],
)
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


@pytest.mark.parametrize(
    "kind", ["sdxl", "sd3", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("sd2", "flux"))]
)
def test_other_architectures_start_at_log_2(kind, tiny_pipeline, tmp_path):
    # SDXL's scheduler has no set_alpha_to_one, whose default in DDIM leaves the last step without noise.
    rows = 12 if kind == "sdxl" else 16
    guidance = 1.0 if kind == "flux" else 2.0  # Flux is told its guidance
    built = online(
        tiny_pipeline(kind), tmp_path, resolution=8, guidance_scale=guidance, max_steps=1,
        per_device_train_batch_size=rows,
    )  # fmt: skip
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
        (
            {"per_device_train_batch_size": 3},
            r"16 rows \(4 pairs, 4 steps .*, 1 inner_epochs\) and an optimizer step takes 3: make",
        ),
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
