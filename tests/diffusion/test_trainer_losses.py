"""Every loss of a run at its start, soft labels, the guard of winners, precision, and what configs refuse."""

import logging
import math
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionImg2ImgPipeline

from llmalign.diffusion.configs import LOSSES, DiffusionPreferenceConfig
from llmalign.diffusion.monitor import moving_average
from llmalign.diffusion.tiny import DDIM
from llmalign.diffusion.trainer import DiffusionPreferenceTrainer
from llmalign.errors import UserError
from llmalign.types import PairScores
from tests.diffusion.training import config, lora, pairs, trainer

HYPER = {
    "dpo": {"beta": 50.0},
    "cdpo": {"beta": 50.0, "flip_rate": 0.1},
    "ipo": {"tau": 0.4},
    "slic": {"beta": 50.0},
    "rpo": {"beta": 50.0, "eta": 0.02},
    "irpo": {"beta": 50.0, "alpha": 3.0},
    "rdpo": {"beta": 50.0, "flip_rate": 0.1},
    "ripo": {"tau": 0.4, "flip_rate": 0.1},
    "rslic": {"beta": 50.0, "flip_rate": 0.1},
    "inpo": {"eta": 0.5, "tau": 0.2},
    "sft": {},
}
# At the start every margin is zero; `error` is the winners' mean denoising error.
AT_START = {
    "dpo": lambda error: math.log(2),
    "cdpo": lambda error: math.log(2),
    "ipo": lambda error: (1 / 0.8) ** 2,
    "slic": lambda error: 1.0,
    "rpo": lambda error: math.log(2) + 0.02 * 50 * error / 2,
    "irpo": lambda error: math.log(2) + 3 * error / 2,
    "rdpo": lambda error: math.log(2),
    "ripo": lambda error: (1 / 0.8) ** 2,
    "rslic": lambda error: 1.0,
    "inpo": lambda error: 1.0,
    "sft": lambda error: error,
}


def first_log(built: DiffusionPreferenceTrainer) -> dict[str, float]:
    return next(entry for entry in built.state.log_history if "loss" in entry)


# Losses


def test_every_loss_is_tried():
    assert HYPER.keys() == AT_START.keys() == LOSSES.keys()


@pytest.mark.parametrize("loss", HYPER)
def test_a_run_starts_at_the_closed_form_and_moves(loss, tiny_pipeline, tmp_path):
    built = trainer(tiny_pipeline("sd"), tmp_path, loss=loss, max_steps=1, **HYPER[loss])
    before = {name: value.clone() for name, value in built.model.named_parameters() if value.requires_grad}
    built.train()
    logged = first_log(built)
    assert logged["rewards/margins"] == 0 and logged["rewards/accuracies"] == 0.5
    assert 0.5 < logged["error/chosen"] < 2 and logged["error/chosen"] == logged["error/ref_chosen"]
    assert logged["loss"] == pytest.approx(AT_START[loss](logged["error/chosen"]), rel=1e-6)
    assert logged["grad_norm"] > 0
    assert any(not torch.equal(value, before[n]) for n, value in built.model.named_parameters() if n in before)


@pytest.mark.parametrize("kind, lora", [("sdxl", True), ("flux", True), ("sd", False), ("sd3", False)])
def test_other_architectures_and_whole_networks_start_at_zero(kind, lora, tiny_pipeline, tmp_path):
    built = trainer(tiny_pipeline(kind), tmp_path, peft=lora, beta=50.0, max_steps=1, caption_dropout=0.3)
    built.train()
    logged = first_log(built)
    assert logged["loss"] == pytest.approx(math.log(2), abs=0 if lora else 1e-5, rel=1e-6)
    if lora:
        assert logged["rewards/margins"] == 0 == logged["rewards/chosen"]
    assert logged["grad_norm"] > 0


def scores_of(*rows: list[float]) -> PairScores:
    """Errors of winner, loser, and of the two under the reference, a row each."""
    return PairScores(*(-0.5 * torch.tensor(column) for column in zip(*rows, strict=True)))


def test_soft_labels_by_hand(tiny_pipeline, tmp_path):
    scores = scores_of([0.1, 0.3, 0.2, 0.25], [0.2, 0.1, 0.15, 0.1], [0.3, 0.3, 0.1, 0.2])
    margins = [0.5 * 20 * value for value in (0.3 - 0.1 - 0.25 + 0.2, 0.1 - 0.2 - 0.1 + 0.15, 0.3 - 0.3 - 0.2 + 0.1)]
    labels = [1.0, 0.5, 0.75]

    def expected(doubts: list[float]) -> list[float]:
        return [
            (1 - doubt) * math.log1p(math.exp(-margin)) + doubt * math.log1p(math.exp(margin))
            for margin, doubt in zip(margins, doubts, strict=True)
        ]

    built = trainer(tiny_pipeline("sd"), tmp_path, ties="soft", beta=20.0)
    inputs = {"label": torch.tensor(labels)}
    found = built.loss_terms(scores, inputs)
    assert list(found) == ["dpo"]
    assert found["dpo"].tolist() == pytest.approx(expected([0.0, 0.5, 0.25]), rel=1e-5)
    # With a share of wrong labels on top: 1 is wrong one time in ten, .75 with .25 * .9 + .75 * .1 = .3.
    built.args.loss, built.args.flip_rate = "cdpo", 0.1
    assert built.loss_terms(scores, inputs)["cdpo"].tolist() == pytest.approx(expected([0.1, 0.5, 0.3]), rel=1e-5)
    built.args.ties = "drop"
    assert built.loss_terms(scores, inputs)["cdpo"].tolist() == pytest.approx(expected([0.1] * 3), rel=1e-5)


def test_a_run_with_ties_has_no_pull_from_them(tiny_pipeline, tmp_path):
    built = trainer(tiny_pipeline("sd"), tmp_path, rows=pairs(8, labels=(0.5,)), ties="soft", max_steps=1)
    built.train()
    assert first_log(built)["loss"] == pytest.approx(math.log(2), rel=1e-6)
    assert first_log(built)["grad_norm"] == pytest.approx(0, abs=1e-5)


def test_summed_errors_with_beta_over_d_are_the_same_run(tiny_pipeline, tmp_path):
    runs = [
        trainer(tiny_pipeline("sd"), tmp_path / name, loss_reduction=name, beta=beta)
        for name, beta in (("mean", 640.0), ("sum", 10.0))
    ]
    for built in runs:
        torch.manual_seed(0)
        for name, value in built.model.named_parameters():
            if "lora_A" in name:
                torch.nn.init.normal_(value.data)
        built.train()
    mean, summed = ([entry for entry in built.state.log_history if "loss" in entry] for built in runs)
    assert runs[1].dimensions == 64 and "6.4e+02" not in runs[1].describe()
    assert "(D = 64), beta 640: 5 a unit" in runs[0].describe() and "beta 10: 5 a unit" in runs[1].describe()
    for ours, theirs in zip(mean, summed, strict=True):
        for key in ("loss", "grad_norm", "rewards/margins", "error/chosen", "error/ref_rejected"):
            assert ours[key] == pytest.approx(theirs[key], rel=1e-4, abs=1e-5), key


@pytest.mark.parametrize("kind", ["sd2", "sd3"])
def test_errors_of_the_noise_weigh_steps_as_epsilon_does(kind, tiny_pipeline, tmp_path):
    found = {}
    for space in ("target", "noise"):
        built = trainer(tiny_pipeline(kind), tmp_path / space, error_space=space, sample_latents=False)
        built.model.train()
        batch = built.data_collator([built.train_dataset[row] for row in range(4)])
        with torch.no_grad():
            found[space] = built.scores(built.model, batch).chosen
    draws = built._train_batch(batch)  # the timesteps that the rows met
    if kind == "sd2":
        weight = DDIMScheduler(**DDIM).alphas_cumprod[draws.timesteps[:4]]
    else:
        weight = (1 - draws.timesteps[:4] / 1000).square()
    torch.testing.assert_close(found["noise"], weight * found["target"], rtol=1e-4, atol=1e-7)


def test_training_on_some_timesteps_alone(tiny_pipeline, tmp_path):
    steps = [249, 499, 749, 999]
    built = trainer(tiny_pipeline("sd"), tmp_path, train_timesteps=steps)
    batch = built.data_collator([built.train_dataset[row] for row in range(8)])
    met = set()
    for epoch in range(6):
        built.state.epoch = float(epoch)
        met |= set(built._train_batch(batch).timesteps.tolist())
    assert met == set(steps)
    assert built.timesteps(torch.tensor([0.0, 0.2499, 0.25, 1 - 2**-24])).tolist() == [249, 249, 499, 999]


# The guard of winners


def test_moving_averages():
    assert moving_average(None, 3.0) == 3.0 and moving_average(math.nan, 3.0) == 3.0
    assert moving_average(1.0, 2.0) == pytest.approx(1.1)


def unlearning(pipe: Any, folder: Any, **changes: Any) -> DiffusionPreferenceTrainer:
    """A run of the whole network whose rate is so high that all errors explode."""
    return trainer(
        pipe,
        folder,
        peft=False,
        learning_rate=0.05,
        max_steps=6,
        winner_error_limit=1.02,
        save_strategy="steps",
        save_steps=6,
        **changes,
    )


def guard_lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.message for record in caplog.records if "winners' denoising error is" in record.message]


def test_guard_warns_once(tiny_pipeline, tmp_path, caplog):
    built = unlearning(tiny_pipeline("sd"), tmp_path)
    with caplog.at_level(logging.WARNING):
        built.train()
    assert built.state.global_step == 6 and len(guard_lines(caplog)) == 1
    averages = [entry["error/winner_ratio_average"] for entry in built.state.log_history if "loss" in entry]
    ratios = [entry["error/winner_ratio"] for entry in built.state.log_history if "loss" in entry]
    assert ratios[0] == averages[0] == 1 and max(ratios) > 1.2
    for place in range(1, 6):
        assert averages[place] == pytest.approx(0.9 * averages[place - 1] + 0.1 * ratios[place])
    entry = built.state.log_history[3]
    assert entry["error/winner_ratio"] == pytest.approx(entry["error/chosen"] / entry["error/ref_chosen"])


def test_guard_stops_and_saves(tiny_pipeline, tmp_path, caplog):
    built = unlearning(tiny_pipeline("sd"), tmp_path, winner_guard="stop")
    with caplog.at_level(logging.WARNING):
        built.train()
    step = built.state.global_step
    assert 1 < step < 6 and len(guard_lines(caplog)) == 1
    assert f"Stopped at step {step}: the winners' denoising error is" in guard_lines(caplog)[0]
    assert [path.name for path in (tmp_path / "out").glob("checkpoint-*")] == [f"checkpoint-{step}"]


def test_guard_that_is_off_says_nothing(tiny_pipeline, tmp_path, caplog):
    built = unlearning(tiny_pipeline("sd"), tmp_path, winner_guard="off")
    with caplog.at_level(logging.WARNING):
        built.train()
    assert built.state.global_step == 6 and not guard_lines(caplog)


def test_the_term_on_winners_by_hand(tiny_pipeline, tmp_path):
    built = trainer(
        tiny_pipeline("sd"), tmp_path, beta=20.0, winner_guard="sft", winner_error_limit=1.5, winner_sft_weight=0.5
    )
    scores = scores_of([0.1, 0.3, 0.2, 0.2], [0.5, 0.1, 0.2, 0.1])
    scores.chosen.requires_grad_()
    terms = built.loss_terms(scores, {})
    assert list(terms) == ["dpo", "winner_sft"]
    # .5 * 20 * (.5 - 1.5 * .2) / 2 = 1 for the second; the first is below the limit
    assert terms["winner_sft"].tolist() == pytest.approx([0, 1.0], rel=1e-5)
    (slope,) = torch.autograd.grad(terms["winner_sft"].sum(), scores.chosen)
    assert slope.tolist() == [0, -10.0]  # a lower error, so a higher score


def test_the_term_on_winners_is_logged(tiny_pipeline, tmp_path):
    built = trainer(tiny_pipeline("sd"), tmp_path, winner_guard="sft", max_steps=1)
    built.train()
    assert first_log(built)["loss/winner_sft"] == 0 and first_log(built)["loss/dpo"] == pytest.approx(math.log(2))


# Precision and memory


def test_bfloat16_starts_where_the_reference_is(tiny_pipeline, tmp_path, caplog):
    built = trainer(tiny_pipeline("sd"), tmp_path, bf16=True, use_cpu=True, max_steps=1)
    seen = []
    built.model.network.conv_out.register_forward_hook(lambda module, args, output: seen.append(output.dtype))
    with caplog.at_level(logging.INFO, logger="llmalign"):
        built.train()
    assert set(seen) == {torch.bfloat16}
    assert first_log(built)["rewards/margins"] == 0
    assert any("Start check passed" in record.message for record in caplog.records)
    assert all(value.dtype == torch.float32 for value in built.model.parameters())


@pytest.mark.parametrize("kind", ["sd", "sd3", "flux"])
def test_checkpointed_activations_give_the_same_gradients(kind, tiny_pipeline, tmp_path):
    found = []
    for checkpointed in (False, True):
        built = trainer(tiny_pipeline(kind), tmp_path / str(checkpointed), activation_checkpointing=checkpointed)
        built.args.max_grad_norm, built.args.learning_rate = 0.0, 0.0
        for name, value in built.model.named_parameters():
            if ".lora_" in name:
                torch.nn.init.constant_(value.data, 0.1)
        built.start_may_differ = "moved by a test"
        gradients: dict[str, torch.Tensor] = {}

        def keep(optimizer: Any, *args: Any, model: Any = built.model, into: dict = gradients) -> None:
            into.update({n: v.grad.clone() for n, v in model.named_parameters() if v.grad is not None})

        built.args.max_steps = 1
        built.create_optimizer()
        built.optimizer.register_step_pre_hook(keep)
        built.train()
        assert built.model.network.is_gradient_checkpointing == checkpointed
        found.append(gradients)
    assert found[0].keys() == found[1].keys() != set()
    assert any(value.abs().max() > 1e-3 for value in found[0].values())
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, rtol=1e-4, atol=1e-6, msg=name)


# What is refused


@pytest.mark.parametrize(
    "given, message",
    [
        ({"loss": "simpo"}, "loss must be one of dpo, cdpo, .*sft, got 'simpo'"),
        ({"loss": "ipo"}, "loss: ipo needs tau"),
        ({"loss": "inpo", "eta": 0.5}, "loss: inpo needs tau"),
        ({"loss": "dpo", "tau": 0.1}, "loss: dpo has no tau; it takes beta"),
        ({"loss": "sft", "tau": 0.1}, "loss: sft has no tau"),
        ({"loss": "sft", "beta": 5.0}, "beta=5.0 is not honoured by .*: loss: sft takes no strength"),
        ({"loss": "ipo", "tau": 0.1, "beta": 5.0}, "beta=5.0 is not honoured by .*: loss: ipo takes tau"),
        ({"loss": "rdpo", "flip_rate": 0.5}, r"flip_rate must be in \[0, 0.5\)"),
        ({"beta": 0.0}, "beta must be a positive finite number, got 0.0"),
        ({"beta": math.nan}, "beta must be a positive finite number, got nan"),
        ({"loss": "ipo", "tau": 0.1, "ties": "soft"}, "ties: soft gives soft labels, which loss: ipo cannot take"),
        ({"ties": "keep"}, "ties must be drop or soft, got 'keep'"),
        ({"loss_reduction": "max"}, "loss_reduction must be mean or sum, got 'max'"),
        ({"error_space": "clean"}, "error_space must be target or noise, got 'clean'"),
        ({"timestep_sampling": "cosine"}, "timestep_sampling must be uniform or logit_normal, got 'cosine'"),
        ({"caption_dropout": 1.0}, r"caption_dropout must be in \[0, 1\), got 1.0"),
        ({"random_flip": "both"}, "random_flip must be none, image or pair, got 'both'"),
        ({"winner_guard": "shout"}, "winner_guard must be one of warn, stop, sft, off, got 'shout'"),
        ({"winner_error_limit": 1.0}, "winner_error_limit must be above 1, got 1.0"),
        ({"winner_sft_weight": 2.0}, "winner_sft_weight=2.0 is not honoured by .*: it belongs to winner_guard: sft"),
        ({"eval_timesteps": 0}, "eval_timesteps must be a positive finite number, got 0"),
        ({"train_timesteps": []}, "train_timesteps is empty"),
        ({"train_timesteps": [1], "timestep_sampling": "uniform"}, "timestep_sampling has no part; drop one"),
        ({"resolution": 0}, "resolution must be a positive finite number, got 0"),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor=0.1 is not honoured by DiffusionPreferenceConfig"),
        ({"remove_unused_columns": True}, "remove_unused_columns must be false"),
        ({"loss": "rdpo", "flip_rate": 0.1, "load_best_model_at_end": True, "metric_for_best_model": "eval_loss",
          "eval_strategy": "steps", "save_strategy": "steps"}, "rdpo loss has no lower bound"),
    ],
    ids=lambda value: "-".join(map(str, value)) if isinstance(value, dict) else "",
)  # fmt: skip
def test_configs_refuse_what_makes_no_sense(given, message, tmp_path):
    with pytest.raises(UserError, match=message) as caught:
        DiffusionPreferenceConfig(output_dir=str(tmp_path), **given)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "kind, given, message",
    [
        ("sd", {"train_timesteps": [3, 1000]}, "train_timesteps: 1000 is outside the schedule, which has 0 to 999"),
        ("sd", {"timestep_sampling": "logit_normal"}, "logit_normal is for flow matching"),
        ("flux", {"resolution": None}, "FluxPipeline does not say which size it was made for: set resolution"),
        ("sd", {"evaluation": {"train": pairs(2)}}, "an evaluation set cannot be called `train`"),
        ("sd", {"loss": "inpo", "eta": 0.5, "tau": 0.2, "ref": "other"}, "inpo with another reference needs start_ad"),
        ("flux", {"resolution": 10}, "resolution must be a multiple of 4 for FluxPipeline, got 10"),
        ("sd", {"resolution": 9}, "resolution must be a multiple of 2 for StableDiffusionPipeline, got 9"),
        ("sd", {"ref": "sd3"}, "the reference is a StableDiffusion3Pipeline, the policy a StableDiffusionPipeline"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_trainers_refuse_what_does_not_fit_the_pipeline(kind, given, message, tiny_pipeline, tmp_path):
    given = dict(given)
    if "ref" in given:
        given["ref"] = tiny_pipeline({"other": "sd"}.get(given["ref"], given["ref"]))
    with pytest.raises(UserError, match=message) as caught:
        trainer(tiny_pipeline(kind), tmp_path, **given)
    assert "\n" not in str(caught.value)


def test_what_is_missing_or_unknown_is_named(tiny_pipeline, tmp_path):
    pipe = tiny_pipeline("sd")
    with pytest.raises(UserError, match="needs its config as `args`, and a train_dataset"):
        DiffusionPreferenceTrainer(pipe, config(tmp_path))
    with pytest.raises(UserError, match="needs its config as `args`, and a train_dataset"):
        DiffusionPreferenceTrainer(pipe)
    with pytest.raises(UserError, match="StableDiffusionImg2ImgPipeline cannot be trained"):
        trainer(StableDiffusionImg2ImgPipeline(**pipe.components, requires_safety_checker=False), tmp_path)
    with pytest.raises(UserError, match="holds no diffusers pipeline"):
        trainer(str(tmp_path), tmp_path, peft=False)
    adapted = tiny_pipeline("sd")
    adapted.unet.add_adapter(lora(adapted), adapter_name="mine")
    with pytest.raises(UserError, match=r"the pipeline has adapters already \(mine\): fuse or unload them"):
        trainer(adapted, tmp_path, peft=False)
    pipe.scheduler = DDIMScheduler(**DDIM, prediction_type="sample")
    with pytest.raises(UserError, match="prediction_type is 'sample'; known are"):
        trainer(pipe, tmp_path)


def test_the_size_is_the_networks_own_where_none_is_given(tiny_pipeline, tmp_path):
    built = trainer(tiny_pipeline("sd3"), tmp_path, resolution=None)
    assert built.resolution == 8 and built.latents.latent_shape == (4, 4, 4)


def test_ties_that_would_be_taken_for_sure_are_refused(tiny_pipeline, tmp_path):
    with pytest.raises(UserError, match="the train rows hold ties"):
        trainer(tiny_pipeline("sd"), tmp_path, rows=pairs(8, labels=(1.0, 0.5)))
