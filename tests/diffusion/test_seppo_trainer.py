"""SePPO: which past checkpoint is drawn when, what it samples, what a batch costs by hand, evaluation, resuming."""

import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from llmalign.diffusion.denoiser import LORA_FILE
from llmalign.diffusion.noise import draw
from llmalign.diffusion.rollouts import row_noise
from llmalign.diffusion.seppo import SePPOConfig, SePPOTrainer
from llmalign.errors import UserError
from tests.diffusion.by_hand import latents_of, noised, plain_prediction
from tests.diffusion.drawing import SHAPE
from tests.diffusion.test_trainer import batch_of, shake
from tests.diffusion.training import config, lora, pairs

BETA = 30.0


def winners(count: int = 8, **options: Any) -> Any:
    return pairs(count, **options).remove_columns(["rejected", "label"]).rename_column("chosen", "image")


def seppo(pipe: Any, folder: Path, *, rows: Any = None, evaluation: Any = None, **changes: Any) -> SePPOTrainer:
    """Two steps of four winners, the past kept after each step."""
    given = {
        **{name: getattr(config(folder), name) for name in (
            "output_dir", "image_cache_dir", "resolution", "max_steps", "per_device_train_batch_size", "logging_steps",
            "per_device_eval_batch_size", "learning_rate", "save_strategy", "disable_tqdm",
        )},
        "report_to": "none", "checkpoint_every": 1, "sampling_steps": 3, "guidance_scale": 2.0, "beta": BETA, **changes,
    }  # fmt: skip
    torch.manual_seed(0)
    return SePPOTrainer(
        pipe, SePPOConfig(**given), winners() if rows is None else rows, evaluation, peft_config=lora(pipe)
    )


def kept(built: SePPOTrainer) -> list[str]:
    return sorted(name for name in built.model.adapters if name != "default")


def state(built: SePPOTrainer, name: str = "default") -> dict[str, Tensor]:
    return {key: value.clone() for key, value in built.model.adapter_state(name).items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


def pipe_with(built: SePPOTrainer, name: str | None, pipe: Any, folder: Path) -> Any:
    """An ordinary pipeline with one of a trainer's adapters, or without any."""
    if name is not None:
        built.model.save_adapter(built.pipeline_class, folder / name, name)
        pipe.load_lora_weights(folder / name)
    return pipe


# Past checkpoints


def test_which_checkpoint_is_drawn_when(tiny_pipeline, tmp_path):
    built = seppo(tiny_pipeline("sd"), tmp_path, checkpoint_every=3)
    copies: dict[str, dict[str, Tensor]] = {}
    chosen = []
    for step in range(9):
        built.state.global_step = step
        chosen.append(built.past_checkpoint())
        assert built.past_checkpoint() == chosen[-1], "the same for all batches of a step"
        names = [f"past_{number}" for number in range(1, step // 3 + 1)]
        assert kept(built) == names
        if step % 3 == 0 and step:
            assert same(state(built, names[-1]), state(built)), "a copy of the policy as it is then"
            copies[names[-1]] = state(built)
        shake(built, seed=step)
        assert all(same(state(built, name), copies[name]) for name in names), "which no longer changes"
    assert chosen[:3] == [None] * 3 and len(set(chosen[3:6])) == len(set(chosen[6:])) == 1
    assert chosen[3] in (None, "past_1") and chosen[6] in (None, "past_1", "past_2")
    assert not same(copies["past_1"], copies["past_2"])


def test_checkpoints_are_drawn_evenly_by_the_seed(tiny_pipeline, tmp_path):
    built = seppo(tiny_pipeline("sd"), tmp_path)
    built.state.global_step = 1
    built.past_checkpoint()
    built.state.global_step = 2
    drawn = []
    for seed in range(300):
        built.args.seed = seed
        drawn.append(built.past_checkpoint())
    counts = Counter(drawn)
    assert counts.keys() == {None, "past_1", "past_2"} and all(70 < count < 130 for count in counts.values())
    for seed in range(300):
        built.args.seed = seed
        assert built.past_checkpoint() == drawn[seed]


def test_gradients_never_reach_the_past(tiny_pipeline, tmp_path):
    built = seppo(tiny_pipeline("sd"), tmp_path, max_steps=4)
    built.train()
    assert kept(built) == ["past_1", "past_2", "past_3"]
    for name, value in built.model.named_parameters():
        own = ".lora_" in name and ".default." in name
        assert value.requires_grad == own, name
        assert (value.grad is None) or own, name
    trained = {id(value) for group in built.optimizer.param_groups for value in group["params"]}
    assert trained == {id(value) for value in built.model.parameters() if value.requires_grad}
    past = [state(built, name) for name in kept(built)]
    assert not same(past[0], past[1]) and not same(past[1], past[2]) and not same(past[2], state(built))


# What a batch costs


def errors_by_hand(pipes: list[Any], rows: Any, samples: Tensor) -> list[list[list[float]]]:
    """Per pipeline the denoising errors of winners and samples, a row at a time."""
    draws = draw((42, "train", 0), rows["row_id"], SHAPE)
    found: list[list[list[float]]] = [[[], []] for _ in pipes]
    for place, row in enumerate(rows):
        winner = latents_of(pipes[0], row["image"], draws.latent[place, 0][None], False)
        index = torch.tensor([int(draws.time[place] * 1000)])
        for side, clean in enumerate((winner, samples[place][None])):
            noisy, target = noised(pipes[0], clean, draws.noise[place, 0][None], index)
            for pipe, into in zip(pipes, found, strict=True):
                with torch.no_grad():
                    prediction = plain_prediction(pipe, noisy, index, [row["caption"]])
                into[side].append(F.mse_loss(prediction, target).item())
    return found


def sampled(pipe: Any, rows: Any, *key: int | str, guidance: float = 2.0) -> Tensor:
    """What an ordinary pipeline samples, by DDIM in three steps."""
    return pipe(
        list(rows["caption"]),
        num_inference_steps=3,
        guidance_scale=guidance,
        latents=row_noise((42, "sample", *key), rows["row_id"], SHAPE),
        output_type="latent",
    ).images


@pytest.mark.parametrize("past, rule, guidance", [
    ("past_1", "sign", 2.0), ("past_1", "indicator", 1.0), (None, "sign", 2.0),
])  # fmt: skip
def test_loss_of_a_batch_by_hand(past, rule, guidance, tiny_pipeline, tmp_path, monkeypatch):
    built = seppo(tiny_pipeline("sd"), tmp_path, flip_rule=rule, guidance_scale=guidance)
    shake(built, seed=3)
    built.state.global_step = 1
    built.past_checkpoint()
    shake(built, seed=4)
    monkeypatch.setattr(built, "past_checkpoint", lambda: past)
    policy = pipe_with(built, "default", tiny_pipeline("sd"), tmp_path)
    reference = pipe_with(built, past, tiny_pipeline("sd"), tmp_path)
    places = list(range(8))
    rows = winners().select(places)
    (own, own_sample), (ref, ref_sample) = errors_by_hand(
        [policy, reference], rows, sampled(reference, rows, 0, guidance=guidance)
    )
    built.model.train()
    inputs = batch_of(built, places)
    scores = built.scores(built.model, inputs)
    found = built.loss_terms(scores, inputs)["dpo"]
    expected, flips = [], []
    for row in places:
        ahead = own[row] < ref[row]
        flips.append(1 if ahead else -1 if rule == "sign" else 0)
        margin = (own[row] - ref[row]) - flips[-1] * (own_sample[row] - ref_sample[row])
        expected.append(math.log1p(math.exp(BETA / 2 * margin)))
    assert len(set(flips)) == 2, "the policy leads on some winners and lags on others"
    assert max(expected) - min(expected) > 0.1
    assert found.tolist() == pytest.approx(expected, rel=1e-3, abs=1e-4)
    metrics = built.row_metrics(scores, inputs)
    assert metrics["seppo/lagging"].tolist() == [float(flip != 1) for flip in flips]
    assert metrics["error/chosen"].tolist() == pytest.approx(own, rel=1e-4)
    for name, known in (("error/rejected", own_sample), ("error/ref_rejected", ref_sample)):
        shown = [error if flip else math.nan for error, flip in zip(known, flips, strict=True)]  # none where left out
        assert metrics[name].tolist() == pytest.approx(shown, rel=1e-3, nan_ok=True)
    found.sum().backward()
    slopes = {name: value.grad for name, value in built.model.named_parameters() if value.grad is not None}
    assert slopes and all(".default." in name for name in slopes)


@pytest.mark.parametrize("tie", [1, 0])
def test_a_tie_is_plain_dpo_or_leaves_the_sample_out(tie, tiny_pipeline, tmp_path):
    built = seppo(tiny_pipeline("sd"), tmp_path, tie=tie)
    built.model.train()
    scores = built.scores(built.model, batch_of(built, [0, 1, 2]))
    assert torch.equal(scores.chosen, scores.ref_chosen)
    assert bool((scores.rejected < 0).all() if tie else (scores.rejected == 0).all())
    assert torch.equal(scores.rejected, scores.ref_rejected)


@pytest.mark.parametrize("every", [1, 2, 30])
def test_a_run_starts_at_log_2_and_compares_with_its_past(every, tiny_pipeline, tmp_path):
    built = seppo(tiny_pipeline("sd"), tmp_path, checkpoint_every=every, max_steps=4, gradient_accumulation_steps=2)
    built.train()
    logs = [entry for entry in built.state.log_history if "loss" in entry]
    assert logs[0]["loss"] == pytest.approx(math.log(2), rel=1e-6) and logs[0]["seppo/lagging"] == 0
    assert logs[0]["grad_norm"] > 0 and 0.3 < logs[-1]["error/rejected"] < 3
    assert kept(built) == [f"past_{number}" for number in range(1, 3 // every + 1)]


def test_a_row_meets_the_same_sample_in_any_company(tiny_pipeline, tmp_path):
    built = seppo(tiny_pipeline("sd"), tmp_path)
    shake(built)
    built.model.train()
    with torch.no_grad():
        whole = built.scores(built.model, batch_of(built, [0, 1, 2, 3]))
        torch.manual_seed(3)
        for rows in ([3], [2, 0]):
            part = built.scores(built.model, batch_of(built, rows))
            for name in ("chosen", "rejected", "ref_rejected"):
                torch.testing.assert_close(vars(part)[name], vars(whole)[name][rows], rtol=1e-4, atol=1e-5)
        built.state.epoch = 1.0
        assert not torch.allclose(built.scores(built.model, batch_of(built, [3])).ref_rejected, whole.ref_rejected[3:])


# Evaluation


def test_evaluation_compares_with_the_first_checkpoint_unflipped_and_repeats(tiny_pipeline, tmp_path, monkeypatch):
    held_out = winners(5, seed=1)
    built = seppo(tiny_pipeline("sd"), tmp_path, evaluation=held_out, eval_timesteps=2)
    shake(built, seed=5)
    built.state.global_step = 1
    built.past_checkpoint()
    monkeypatch.setattr(built, "past_checkpoint", lambda: "past_1")  # which training would compare with
    built.reference_adapter = "past_1"
    shake(built)
    base = tiny_pipeline("sd")
    policy = pipe_with(built, "default", tiny_pipeline("sd"), tmp_path)
    samples = sampled(base, held_out, "eval")
    margins, lags = [], 0
    for place, row in enumerate(held_out):
        errors: dict[tuple[str, int], float] = {}
        for step in range(2):
            draws = draw((42, "eval", step), held_out["row_id"], SHAPE)
            index = torch.tensor([250 + 500 * step])
            for side, clean in enumerate((latents_of(base, row["image"], None, False), samples[place][None])):
                noisy, target = noised(base, clean, draws.noise[place, 0][None], index)
                for name, pipe in (("own", policy), ("ref", base)):
                    with torch.no_grad():
                        error = F.mse_loss(plain_prediction(pipe, noisy, index, [row["caption"]]), target).item()
                    errors[name, side] = errors.get((name, side), 0.0) + error / 2
        lags += errors["own", 0] > errors["ref", 0]
        margins.append(-BETA / 2 * (errors["own", 0] - errors["ref", 0] - errors["own", 1] + errors["ref", 1]))
    assert lags > 0, "a flip would show"
    measured = built.evaluate()
    assert measured["eval_rewards/margins"] == pytest.approx(sum(margins) / 5, rel=1e-3, abs=1e-4)
    assert measured["eval_loss"] == pytest.approx(sum(math.log1p(math.exp(-m)) for m in margins) / 5, rel=1e-3)
    monkeypatch.setattr(built, "_sample", None)  # the samples are kept
    torch.manual_seed(5)
    built.args.per_device_eval_batch_size = 2
    again = built.evaluate()
    for name in ("eval_loss", "eval_rewards/margins", "eval_error/ref_rejected"):
        assert again[name] == pytest.approx(measured[name], rel=1e-5)


def test_evaluation_sets_with_the_same_row_ids_have_samples_of_their_own(tiny_pipeline, tmp_path):
    one, other = (winners(2, captions=(caption,)) for caption in ("digit one", "a red picture"))
    together = seppo(tiny_pipeline("sd"), tmp_path / "a", evaluation={"one": one, "other": other}).evaluate()
    alone = seppo(tiny_pipeline("sd"), tmp_path / "b", evaluation=other).evaluate()
    assert together["eval_other_error/rejected"] == pytest.approx(alone["eval_error/rejected"], rel=1e-6)
    assert together["eval_one_error/rejected"] != pytest.approx(alone["eval_error/rejected"], rel=1e-6)


# Resuming


@pytest.mark.slow
def test_a_resumed_run_ends_at_the_same_bits(tiny_pipeline, tmp_path):
    options = {"max_steps": 6, "checkpoint_every": 2, "save_strategy": "steps", "save_steps": 1, "seed": 1}
    whole = seppo(tiny_pipeline("sd"), tmp_path / "whole", **options)
    whole.train()
    folder = tmp_path / "whole" / "out"
    assert sorted(path.name for path in (folder / "checkpoint-5" / "adapters").iterdir()) == ["past_1", "past_2"]
    assert not (folder / "checkpoint-2" / "adapters").exists(), "it is kept when the next step begins"
    chosen = set()
    for step in range(2, 6):
        whole.state.global_step = step
        chosen.add(whole.past_checkpoint())
    assert chosen - {None}, "the seed lets the run compare with its past"
    expected = load_file(folder / "checkpoint-6" / LORA_FILE)
    for step in (2, 5):
        built = seppo(tiny_pipeline("sd"), tmp_path / str(step), **options)
        built.train(resume_from_checkpoint=str(folder / f"checkpoint-{step}"))
        assert all(same(state(built, name), state(whole, name)) for name in ("past_1", "past_2")), step
        found = load_file(tmp_path / str(step) / "out" / "checkpoint-6" / LORA_FILE)
        assert not [name for name, value in expected.items() if not torch.equal(found[name], value)], step


# Other architectures, and what is refused


@pytest.mark.parametrize(
    "kind", ["sd3", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("sd2", "sdxl", "flux"))]
)
def test_other_architectures_run(kind, tiny_pipeline, tmp_path):
    guidance = 1.0 if kind == "flux" else 2.0  # Flux is told its guidance
    built = seppo(tiny_pipeline(kind), tmp_path, guidance_scale=guidance)
    built.train()
    logs = [entry for entry in built.state.log_history if "loss" in entry]
    assert logs[0]["loss"] == pytest.approx(math.log(2), rel=1e-5) and kept(built) == ["past_1"]


@pytest.mark.parametrize(
    "given, message",
    [
        ({"loss": "ipo", "tau": 0.1}, "SePPO's loss is dpo with one side flipped, and loss is ipo: leave it out"),
        ({"ties": "soft"}, "ties='soft' is not honoured by SePPOConfig: it has winners alone"),
        ({"ref_model_name_or_path": "x"}, "ref_model_name_or_path='x' is not honoured .* the reference is a past"),
        ({"start_adapter": "x"}, "start_adapter='x' is not honoured .* the first checkpoint is the network without"),
        ({"checkpoint_every": 0}, "checkpoint_every must be a positive finite number, got 0"),
        ({"sampling_steps": 0}, "sampling_steps must be a positive finite number, got 0"),
        ({"flip_rule": "coin"}, "flip_rule must be one of sign, indicator, got 'coin'"),
        ({"tie": -1}, "tie must be 1 or 0, got -1"),
        ({"guidance_scale": 0.0}, r"guidance_scale must be 1 \(off\) or more, got 0.0"),
        ({"beta": -1.0}, "beta must be a positive finite number, got -1.0"),
    ],
    ids=lambda value: "-".join(map(str, value)) if isinstance(value, dict) else "",
)
def test_configs_refuse_what_makes_no_sense(given, message, tmp_path):
    with pytest.raises(UserError, match=message) as caught:
        SePPOConfig(output_dir=str(tmp_path), **given)
    assert "\n" not in str(caught.value)


def test_whole_networks_and_other_references_are_refused(tiny_pipeline, tmp_path):
    args = SePPOConfig(output_dir=str(tmp_path))
    with pytest.raises(UserError, match="SePPO keeps its past checkpoints as adapters: set use_peft: true"):
        SePPOTrainer(tiny_pipeline("sd"), args, winners(2))
    pipe = tiny_pipeline("sd")
    with pytest.raises(UserError, match="SePPO takes no ref_model: the reference is a past checkpoint"):
        SePPOTrainer(pipe, args, winners(2), peft_config=lora(pipe), ref_model=tiny_pipeline("sd"))
