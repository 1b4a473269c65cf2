"""TRL's own trainers under this project's names: what is added to them."""

import pytest
from peft import LoraConfig

from llmalign import DPOConfig, DPOTrainer, RewardConfig, RewardTrainer, SFTConfig, SFTTrainer
from tests.trainers import tiny

COMMON = {
    "max_steps": 1, "per_device_train_batch_size": 2, "save_strategy": "no", "report_to": "none",
    "disable_tqdm": True, "logging_steps": 1, "max_length": 64,
}  # fmt: skip


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    return tiny.save(tmp_path_factory.mktemp("start"))


def texts(n, seed):
    return tiny.pairs(n, seed).map(lambda row: {"text": row["prompt"] + row["chosen"]}).select_columns(["text"])


@pytest.mark.parametrize(
    ("trainer", "config", "rows", "metric"),
    [
        (DPOTrainer, DPOConfig, tiny.pairs, "rewards/margins"),
        (SFTTrainer, SFTConfig, texts, "mean_token_accuracy"),
        (RewardTrainer, RewardConfig, tiny.pairs, "margin"),
    ],
)
def test_evaluation_sets_keep_their_names(start, tmp_path, trainer, config, rows, metric):
    sets = {"first": rows(4, 1), "second": rows(6, 2)}
    built = trainer(
        model=start,
        args=config(output_dir=str(tmp_path), **COMMON),
        train_dataset=rows(4, 0),
        eval_dataset=sets,
        processing_class=tiny.tokenizer(),
    )
    built.train()
    measured = built.evaluate()
    assert {f"eval_first_{metric}", f"eval_second_{metric}"} <= set(measured)
    assert f"eval_{metric}" not in measured
    alone = built.evaluate(built.eval_dataset["second"])
    assert measured[f"eval_second_{metric}"] == pytest.approx(alone[f"eval_{metric}"], abs=1e-6)


def test_a_reward_model_trains_with_an_adapter(start, tmp_path):
    adapter = LoraConfig(task_type="SEQ_CLS", modules_to_save=["score"], target_modules=["q_proj"])
    built = RewardTrainer(
        model=start,
        args=RewardConfig(output_dir=str(tmp_path), **COMMON),
        train_dataset=tiny.pairs(4),
        processing_class=tiny.tokenizer(),
        peft_config=adapter,
    )
    built.train()
    assert any("score" in name for name, p in built.model.named_parameters() if p.requires_grad)
