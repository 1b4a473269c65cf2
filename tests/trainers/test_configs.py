"""Configs are validated where they are made, and say what they chose."""

import pytest
import torch

from llmalign import CoPGConfig, DPOConfig, INPOConfig, PairConfig, RDPOConfig, RewardConfig, RPOConfig, SFTConfig
from llmalign.errors import UserError
from llmalign.trainers.pf_ppo_config import PFPPOConfig

ALL = [CoPGConfig, DPOConfig, INPOConfig, PairConfig, RDPOConfig, RPOConfig, RewardConfig, SFTConfig]


@pytest.mark.parametrize("config", ALL)
def test_runs_without_an_accelerator_and_says_so(config, tmp_path):
    if torch.cuda.is_available() or torch.backends.mps.is_available():
        pytest.skip("this machine has an accelerator")
    args = config(output_dir=str(tmp_path))
    assert (args.use_cpu, args.bf16, args.gradient_checkpointing) == (True, False, False)
    assert args.choices == "CPU, float32, without gradient checkpointing"


def test_what_the_user_sets_is_kept(tmp_path):
    args = RPOConfig(output_dir=str(tmp_path), use_cpu=True, bf16=True, gradient_checkpointing=True)
    assert args.bf16 and args.gradient_checkpointing
    assert args.choices == "CPU, bfloat16, with gradient checkpointing"


def test_paper_values():
    assert (RPOConfig().beta, RPOConfig().eta, RPOConfig().base) == (0.01, 0.005, "chosen")
    assert INPOConfig().tau == pytest.approx(0.005 / 3)
    assert INPOConfig().max_grad_norm == 1.0  # the squared loss starts with a gradient of 200 per nat
    assert CoPGConfig().beta == 0.06


@pytest.mark.parametrize(
    ("config", "options", "words"),
    [
        (RPOConfig, {"beta": 0}, "beta must be a positive finite number, got 0"),
        (RPOConfig, {"beta": float("nan")}, "beta must be"),
        (RPOConfig, {"eta": -0.1}, "eta must be zero or a positive"),
        (RPOConfig, {"model_init_kwargs": "4"}, "model_init_kwargs must be a mapping, got .4."),
        (RPOConfig, {"base": "worst"}, "base must be chosen, reference or column"),
        (RPOConfig, {"alarm_prompts": -1}, "alarm_prompts must be zero or more"),
        (RDPOConfig, {"flip_rate": 0.5}, r"flip_rate must be in \[0, 0.5\).*divides by zero"),
        (RDPOConfig, {"flip_rate": -0.1}, "flip_rate must be"),
        (RDPOConfig, {"flip_rate": True}, "flip_rate must be"),
        (RDPOConfig, {"flip_rate": "estimate"}, "needs scorer_margin_column"),
        (RDPOConfig, {"scorer_margin_column": "m"}, "only used with flip_rate: estimate"),
        (RDPOConfig, {"load_best_model_at_end": True, "eval_strategy": "steps", "metric_for_best_model": "loss"},
         "no lower bound"),
        (INPOConfig, {"tau": -0.01}, "tau must be zero or a positive"),
        (INPOConfig, {"eta": 0}, "eta must be a positive"),
        (INPOConfig, {"beta": 0.3}, "beta=0.3 is not honoured by INPOConfig: INPO takes eta and tau"),
        (INPOConfig, {"last_adapter": "a", "last_model_name_or_path": "b"}, "name the previous iterate once"),
        (CoPGConfig, {"beta": -1}, "beta must be a positive"),
        (CoPGConfig, {"normalize_rewards": "yes"}, "normalize_rewards must be none, group or dataset"),
        (CoPGConfig, {"scoring": "packed"}, "scoring must be one of auto, shared_prompt, padding_free, padded"),
        (RPOConfig, {"tokens_per_batch": 0}, "tokens_per_batch must be a positive whole number"),
        (PairConfig, {"loss": "kto"}, "loss must be one of dpo, cdpo"),
        (PairConfig, {"loss": "inpo"}, "use method: inpo"),
        (PairConfig, {"loss": "ipo"}, "loss: ipo needs tau"),
        (PairConfig, {"loss": "ipo", "tau": -0.1}, "tau must be a positive"),
        (PairConfig, {"loss": "ipo", "tau": 0.1, "beta": 0.3}, "beta=0.3 is not honoured"),
        (PairConfig, {"loss": "dpo", "tau": 0.1}, "loss: dpo has no tau; it takes beta"),
        (PairConfig, {"loss": "cdpo", "flip_rate": 1.1}, r"flip_rate must be in \[0, 1\]"),
        (PairConfig, {"loss": "rdpo", "flip_rate": 0.5}, "flip_rate must be"),
        (PairConfig, {"loss": "irpo", "alpha": -1.0}, "alpha must be zero or"),
        (RPOConfig, {"loss_type": ["ipo"]}, "loss_type=.*is not honoured by RPOConfig: choose the loss by the method"),
        (RPOConfig, {"label_smoothing": 0.1}, "label_smoothing=0.1 is not honoured"),
        (RPOConfig, {"sync_ref_model": True}, "the papers' reference is frozen"),
        (RPOConfig, {"padding_free": True}, "TRL 1.16 ignores it"),
        (RPOConfig, {"disable_dropout": False}, "dropout makes policy and reference differ"),
        (RPOConfig, {"neftune_noise_alpha": 5.0}, "noise in the embeddings"),
        (RPOConfig, {"truncation_mode": "keep_end"}, "only keep_start"),
        (RPOConfig, {"learning_rate": 1e300}, r"learning_rate must be at most 3.4e\+38"),
        (RPOConfig, {"max_length": 10**400}, "max_length must be at most"),
        (PFPPOConfig, {"reward_clip": 1e300}, "reward_clip must be at most"),
        (RPOConfig, {"save_on_each_node": True}, "save_on_each_node=True .*one output_dir"),
    ],
)  # fmt: skip
def test_bad_values_get_one_sentence(config, options, words, tmp_path):
    with pytest.raises(UserError, match=words) as caught:
        config(output_dir=str(tmp_path), **options)
    assert "\n" not in str(caught.value)


def test_rdpo_picks_its_best_checkpoint_by_accuracy(tmp_path):
    args = RDPOConfig(
        output_dir=str(tmp_path), load_best_model_at_end=True, eval_strategy="steps", save_strategy="steps"
    )
    assert (args.metric_for_best_model, args.greater_is_better) == ("rewards/accuracies", True)


def test_a_launch_that_would_switch_deepspeed_off_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    assert RPOConfig(output_dir=str(tmp_path), use_cpu=True).use_cpu
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(UserError, match="unset it and set DS_ACCELERATOR=cpu"):
        RPOConfig(output_dir=str(tmp_path), use_cpu=True)
