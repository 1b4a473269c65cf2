"""Offline PSO: what a batch costs by hand, at which timesteps, what is logged, and what is refused."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers import EulerAncestralDiscreteScheduler

from llmalign.diffusion.noise import draw
from llmalign.diffusion.pso import PSOOfflineConfig, PSOOfflineTrainer
from llmalign.errors import UserError
from tests.diffusion.by_hand import latents_of, noised, plain_prediction
from tests.diffusion.drawing import SHAPE, policy_of
from tests.diffusion.test_trainer import batch_of, shake
from tests.diffusion.training import config, lora, pairs
from tests.diffusion.vectors import ALPHAS

SCHEDULE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
TURBO = [999, 749, 499, 249]
FACTOR, PRIOR, BETA = 0.4, 0.7, 5.0


def distilled(pipe: Any, prediction_type: str = "epsilon") -> Any:
    """With the scheduler of SDXL-Turbo."""
    pipe.scheduler = EulerAncestralDiscreteScheduler(
        **SCHEDULE, timestep_spacing="trailing", prediction_type=prediction_type
    )
    return pipe


def pso(pipe: Any, folder: Path, *, peft: bool = True, evaluation: Any = None, **changes: Any) -> PSOOfflineTrainer:
    given = {
        **{name: getattr(config(folder), name) for name in (
            "output_dir", "image_cache_dir", "resolution", "max_steps", "per_device_train_batch_size", "logging_steps",
            "per_device_eval_batch_size", "learning_rate", "save_strategy", "disable_tqdm",
        )},
        "report_to": "none", "negative_factor": FACTOR, "prior_weight": PRIOR, **changes,
    }  # fmt: skip
    torch.manual_seed(0)
    return PSOOfflineTrainer(
        pipe, PSOOfflineConfig(**given), pairs(), evaluation, peft_config=lora(pipe) if peft else None
    )


def clean_errors(pipes: list[Any], rows: Any) -> list[list[list[float]]]:
    """Per pipeline and side, errors of the clean latents over sigma squared, as the authors' script has them."""
    draws = draw((42, "train", 0), rows["row_id"], SHAPE)
    found: list[list[list[float]]] = [[[], []] for _ in pipes]
    for place, row in enumerate(rows):
        time = TURBO[int(4 * draws.time[place])]
        alpha = ALPHAS[time]
        for side, name in enumerate(("chosen", "rejected")):
            clean = latents_of(pipes[0], row[name], draws.latent[place, side][None], False)
            noisy, _ = noised(pipes[0], clean, draws.noise[place, side][None], torch.tensor([time]))
            for pipe, into in zip(pipes, found, strict=True):
                with torch.no_grad():
                    prediction = plain_prediction(pipe, noisy, torch.tensor([time]), [row["caption"]]).double()
                if pipe.scheduler.config.prediction_type == "v_prediction":
                    prediction = alpha.sqrt() * prediction + (1 - alpha).sqrt() * noisy
                estimate = (noisy - (1 - alpha).sqrt() * prediction) / alpha.sqrt()
                sigma = ((1 - alpha) / alpha).sqrt()
                into[side].append((F.mse_loss(estimate, clean.double()) / sigma**2).item())
    return found


@pytest.mark.parametrize("kind", ["sd", "sd2"])
@pytest.mark.parametrize("variant", ["pso", "pso_db"])
def test_loss_of_a_batch_by_hand(variant, kind, tiny_pipeline, tmp_path):
    prediction = "epsilon" if kind == "sd" else "v_prediction"
    built = pso(distilled(tiny_pipeline(kind), prediction), tmp_path, variant=variant)
    assert built.args.beta == BETA
    shake(built)
    base = distilled(tiny_pipeline(kind), prediction)
    policy = policy_of(built, distilled(tiny_pipeline(kind), prediction), tmp_path / "policy")
    rows = pairs().select(range(6))
    (winner, loser), (ref_winner, ref_loser) = clean_errors([policy, base], rows)
    expected = []
    for i in range(6):
        if variant == "pso":
            logit = (ref_winner[i] - FACTOR * ref_loser[i]) - (winner[i] - FACTOR * loser[i])
            expected.append(math.log1p(math.exp(-BETA * logit)))
        else:
            expected.append(max(0.0, 1 - BETA * -(winner[i] - FACTOR * loser[i])))
    built.model.train()
    inputs = batch_of(built, list(range(6)))
    scores = built.scores(built.model, inputs)
    terms = built.loss_terms(scores, inputs)
    assert list(terms) == [variant, "prior"]
    assert terms[variant].tolist() == pytest.approx(expected, rel=2e-3)
    assert terms["prior"].tolist() == pytest.approx([PRIOR * error for error in loser], rel=2e-3)
    whole = sum(expected) / 6 + PRIOR * sum(loser) / 6
    built.start_may_differ = "moved by a test"
    assert built.compute_loss(built.model, inputs).item() == pytest.approx(whole, rel=2e-3)
    # What is logged are the errors themselves.
    metrics = built.row_metrics(scores, inputs)
    for name, errors in (("chosen", winner), ("rejected", loser)):
        assert metrics[f"error/{name}"].tolist() == pytest.approx(errors, rel=2e-3), name
    for name, errors in (("ref_chosen", ref_winner), ("ref_rejected", ref_loser)):
        known = errors if variant == "pso" else [0.0] * 6
        assert metrics[f"error/{name}"].tolist() == pytest.approx(known, rel=2e-3), name


def test_the_timesteps_are_the_samplers_and_each_comes_as_often(tiny_pipeline, tmp_path):
    built = pso(distilled(tiny_pipeline("sd")), tmp_path)
    assert built.distilled.tolist() == TURBO
    assert built.timesteps(torch.tensor([0.0, 0.2499, 0.25, 0.5, 0.75, 1 - 2**-24])).tolist() == [
        999, 999, 749, 499, 249, 249
    ]  # fmt: skip
    batch = batch_of(built, list(range(8)))
    met = []
    for epoch in range(40):
        built.state.epoch = float(epoch)
        timesteps = built._train_batch(batch).timesteps
        assert torch.equal(timesteps[:8], timesteps[8:])
        met += timesteps[:8].tolist()
    assert {step: 50 < met.count(step) < 110 for step in set(met)} == dict.fromkeys(TURBO, True)
    consistency = pso(tiny_pipeline("sd"), tmp_path, sampler="consistency", sampling_steps=2)
    assert consistency.distilled.tolist() == [999, 499]


@pytest.mark.parametrize("variant, peft", [("pso", True), ("pso", False), ("pso_db", True)])
def test_a_run_starts_at_the_closed_form(variant, peft, tiny_pipeline, tmp_path):
    built = pso(distilled(tiny_pipeline("sd")), tmp_path, variant=variant, peft=peft, evaluation=pairs(3, seed=1))
    built.train()
    first = next(entry for entry in built.state.log_history if "loss" in entry)
    chosen, rejected = first["error/chosen"], first["error/rejected"]
    start = math.log(2) if variant == "pso" else 1 + BETA * (chosen - FACTOR * rejected)
    assert first[f"loss/{variant}"] == pytest.approx(start, rel=1e-5)
    assert first["loss/prior"] == pytest.approx(PRIOR * rejected, rel=1e-5)
    assert first["loss"] == pytest.approx(first[f"loss/{variant}"] + first["loss/prior"], rel=1e-5)
    assert first["grad_norm"] > 0 and 0.3 < chosen < 3 and 0.3 < rejected < 3
    measured, again = built.evaluate(), built.evaluate()
    assert measured["eval_loss"] == again["eval_loss"] and 0.3 < measured["eval_error/rejected"] < 3
    assert ("error/winner_ratio" in first) == (variant == "pso"), "there is nothing to compare with, or there is"


def test_the_prior_may_be_left_out(tiny_pipeline, tmp_path):
    built = pso(distilled(tiny_pipeline("sd")), tmp_path, prior_weight=0.0, max_steps=1)
    built.train()
    first = next(entry for entry in built.state.log_history if "loss" in entry)
    assert first["loss"] == pytest.approx(math.log(2), rel=1e-6)


@pytest.mark.parametrize("kind", ["sd3", "flux"])
def test_flows_are_refused(kind, tiny_pipeline, tmp_path):
    with pytest.raises(UserError, match="pso_offline is for distilled diffusion models; this pipeline matches flows"):
        pso(tiny_pipeline(kind), tmp_path)


@pytest.mark.parametrize(
    "given, message",
    [
        ({"loss": "ipo"}, "loss='ipo' is not honoured by PSOOfflineConfig: the variant decides"),
        ({"loss_reduction": "sum"}, "loss_reduction='sum' is not honoured .* its errors are means"),
        ({"error_space": "noise"}, "error_space='noise' is not honoured .* errors are those of the noise"),
        ({"train_timesteps": [1]}, r"train_timesteps=\[1\] is not honoured .* they are the sampler's"),
        ({"timestep_sampling": "uniform"}, "timestep_sampling='uniform' is not honoured .* are the sampler's"),
        ({"ties": "soft"}, "ties='soft' is not honoured .* no soft labels"),
        ({"winner_guard": "stop"}, "winner_guard='stop' is not honoured .* its prior term holds the errors"),
        ({"variant": "dpo"}, "variant must be one of pso, pso_db, got 'dpo'"),
        ({"sampler": "euler"}, "sampler must be one of ddim, euler_ancestral, consistency, flow_sde, got 'euler'"),
        ({"sampling_steps": 0}, "sampling_steps must be a positive finite number, got 0"),
        ({"negative_factor": 0.0}, "negative_factor must be a positive finite number, got 0.0"),
        ({"prior_weight": -0.5}, "prior_weight must be zero or more, got -0.5"),
        ({"beta": 0.0}, "beta must be a positive finite number, got 0.0"),
    ],
    ids=lambda value: "-".join(map(str, value)) if isinstance(value, dict) else "",
)
def test_configs_refuse_what_makes_no_sense(given, message, tmp_path):
    with pytest.raises(UserError, match=message) as caught:
        PSOOfflineConfig(output_dir=str(tmp_path), **given)
    assert "\n" not in str(caught.value)
