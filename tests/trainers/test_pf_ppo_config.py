"""What PF-PPO accepts and refuses."""

import pytest

from llmalign.errors import UserError
from llmalign.trainers.pf_ppo_config import PFPPOConfig
from tests.trainers import sampled_runs as runs
from tests.trainers import tiny


def options(**given):
    return runs.COMMON | given


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"strategy": "best"}, "strategy must be one of none, best_of_n"),
        ({"selection": "some"}, "selection must be one of exact, resample"),
        ({"advantage": "loo"}, "advantage must be one of gae, group"),
        ({"critic": "body"}, "critic must be one of head, model"),
        ({"whitening": "never"}, "whitening must be one of after, before"),
        ({"clip": 0}, "clip must be"),
        ({"value_clip": -1.0}, "value_clip must be"),
        ({"gae_lambda": 1.5}, "gae_lambda must be in"),
        ({"gamma": -0.1}, "gamma must be in"),
        ({"reward_clip": 0.0}, "reward_clip must be"),
        ({"strategy": "power", "power": -2.0}, "power must be"),
        ({"draws": 3}, "draws=3 .* belongs to selection: resample"),
        ({"power": 2.0}, "power=2.0 .* belongs to strategy: power"),
        ({"advantage": "group", "gamma": 0.9}, "gamma=0.9 .* belongs to advantage: gae"),
        ({"use_vllm": True, "sampling_batch_size": 4}, "sampling_batch_size is set, but vLLM"),
        ({"draws": 0, "selection": "resample"}, "draws must be"),
        ({"critic_learning_rate": 0.0}, "critic_learning_rate must be"),
        ({"advantage": "group", "critic": "model"}, "critic is set, but advantage: group"),
        ({"advantage": "group", "value_coef": 0.5}, "value_coef is set, but advantage: group"),
        ({"critic_model_name_or_path": "rm"}, "set critic: model"),
        ({"epsilon": 0.5}, "set clip"),
        ({"num_generations": 1}, "nothing to choose from: set strategy: none"),
        ({"num_generations": 1, "strategy": "none", "advantage": "group"}, "num_generations must be at least 2"),
        ({"num_generations": 1, "strategy": "none", "per_device_train_batch_size": 1}, "at least 2: advantages are"),
    ],
)
def test_bad_values_are_refused(given, sentence, tmp_path):
    with pytest.raises(UserError, match=sentence):
        PFPPOConfig(output_dir=str(tmp_path), use_cpu=True, **options(**given))


def test_a_critic_model_that_would_not_be_used_is_refused(tmp_path):
    args = PFPPOConfig(output_dir=str(tmp_path), use_cpu=True, **options())
    with pytest.raises(UserError, match="critic_model is given"):
        runs.ModelCriticTrainer(
            tiny.model(), runs.checksum, args, train_dataset=runs.prompts(), processing_class=tiny.tokenizer()
        )
