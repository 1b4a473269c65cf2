"""What f-DPG accepts and refuses."""

import pytest

from llmalign.errors import UserError
from llmalign.trainers.fdpg import FDPGTrainer
from llmalign.trainers.fdpg_config import FDPGConfig
from tests.trainers import sampled_runs as runs
from tests.trainers.small_space import (
    small_trainer,
)


@pytest.mark.parametrize(
    ("named", "picks"), [(None, ("js", False)), ("kl_p_pi", ("kl_p_pi", False)), ("reward", ("reward", True))]
)
def test_the_best_checkpoint_is_the_nearest(named, picks, tmp_path):
    args = FDPGConfig(
        output_dir=str(tmp_path), use_cpu=True, load_best_model_at_end=True, eval_strategy="steps", eval_steps=1,
        metric_for_best_model=named, **(runs.COMMON | {"save_strategy": "steps", "save_steps": 1}),
    )  # fmt: skip
    assert (args.metric_for_best_model, args.greater_is_better) == picks


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"divergence": "reverse_kl"}, "reverse_kl is infinite on this target.*constraint_floor"),
        ({"divergence": "chi2_reverse", "target": "distributional", "moments": [1.0]}, "chi2_reverse is infinite"),
        ({"divergence": "kl"}, "divergence must be one of forward_kl"),
        ({"target": "distributional"}, "needs moments"),
        ({"moments": [0.5]}, "moments=.* belongs to target: distributional"),
        ({"target": "distributional", "moments": 0.5}, "moments must be a list of numbers"),
        ({"target": "distributional", "moments": ["a"]}, "moments must be a list of numbers"),
        ({"moment_samples": 8}, "moment_samples=8 .* belongs to target: distributional"),
        ({"baseline_window": 8}, "baseline_window=8 .* belongs to baseline: window"),
        ({"proposal_update_interval": 8}, "proposal_update_interval=8 .* belongs to proposal: offline"),
        ({"vllm_structured_outputs_regex": "a*"}, "vllm_structured_outputs_regex constrains what is drawn"),
        ({"beta": 0.5}, "beta=0.5 .* belongs to target: reward"),
        ({"target": "reward", "constraint_floor": 1e-6}, "constraint_floor belongs to constraints"),
        ({"reward_weights": [2.0]}, "reward_weights=.* belongs to target: reward"),
        ({"target": "distributional", "moments": [0.5], "constraint_floor": 1e-6}, "no moment here is 0 or 1"),
        ({"constraint_floor": 2.0}, "floor must lie between"),
        ({"baseline": "one"}, "baseline: one"),
        ({"baseline": "mean"}, "baseline must be one of"),
        ({"use_transformers_continuous_batching": True}, "refused on a CPU"),
        ({"temperature": 0.7}, "temperature must be 1"),
        ({"top_p": 0.9}, "top_p must be 1"),
        ({"top_k": 50}, "top_k must be 0"),
        ({"min_p": 0.1}, "min_p must be 0"),
        ({"repetition_penalty": 1.2}, "repetition_penalty must be 1"),
        ({"generation_kwargs": {"no_repeat_ngram_size": 3}}, "no_repeat_ngram_size is refused"),
        ({"mask_truncated_completions": True}, "not honoured"),
        ({"proposal": "offline", "use_vllm": True}, "cannot use vLLM"),
        ({"proposal": "sometimes"}, "proposal must be one of"),
        ({"max_z": -1.0}, "max_z must be a positive"),
        ({"moment_samples": 0}, "moment_samples must be a positive"),
    ],
)
def test_bad_values_are_refused(options, sentence, tmp_path):
    with pytest.raises(UserError, match=sentence):
        FDPGConfig(output_dir=str(tmp_path), use_cpu=True, **(runs.COMMON | options))


@pytest.mark.parametrize(
    ("options", "baseline"),
    [
        ({"divergence": "forward_kl"}, "one"),
        ({"divergence": "js"}, "leave_one_out"),
        ({"divergence": "reverse_kl", "constraint_floor": 1e-6}, "leave_one_out"),
        ({"divergence": "reverse_kl", "target": "distributional", "moments": [0.5]}, "leave_one_out"),
        ({"divergence": "chi2_reverse", "target": "reward", "beta": 0.2, "reward_weights": [2.0]}, "leave_one_out"),
    ],
)
def test_good_values_pass(options, baseline, tmp_path):
    assert FDPGConfig(output_dir=str(tmp_path), use_cpu=True, **(runs.COMMON | options)).baseline == baseline


def test_moments_and_features_must_be_as_many(tmp_path):
    with pytest.raises(UserError, match="2 moments need as many reward_funcs"):
        small_trainer(tmp_path, target="distributional", moments=[0.5, 0.5])


def test_a_constraint_that_is_not_yes_or_no_is_refused(tmp_path):
    def half(prompts, completions, **columns):
        return [0.5] * len(prompts)

    with pytest.raises(UserError, match="a constraint is 0 or 1"):
        runs.rollout(small_trainer(tmp_path, reward=half))


def test_moments_that_no_completion_shows_are_refused(tmp_path):
    def never(prompts, completions, **columns):
        return [0.0] * len(prompts)

    options = {"trainer": FDPGTrainer, "target": "distributional", "moments": [0.5], "moment_samples": 100}
    with pytest.raises(UserError, match="moment 0.5 of feature 0 cannot be reached"):
        small_trainer(tmp_path, reward=never, **options).train()
