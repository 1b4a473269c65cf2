"""Runs of the on-policy trainers on a tiny model, with completions that may be recorded instead of sampled."""

import hashlib
import random

import torch
from datasets import Dataset
from transformers import LlamaForSequenceClassification

from llmalign.trainers.copg import OnlineCoPGTrainer
from llmalign.trainers.fdpg import FDPGTrainer
from llmalign.trainers.fdpg_config import FDPGConfig
from llmalign.trainers.mdpo import MDPOTrainer
from llmalign.trainers.pf_ppo import PFPPOTrainer
from llmalign.trainers.pf_ppo_config import PFPPOConfig
from llmalign.trainers.sampled_configs import MDPOConfig, OnlineCoPGConfig
from tests.trainers import tiny


def reward_model(seed: int = 7) -> LlamaForSequenceClassification:
    config = tiny.model().config
    config.num_labels = 1
    torch.manual_seed(seed)
    return LlamaForSequenceClassification(config)


class ModelCriticTrainer(PFPPOTrainer):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, critic_model=reward_model(), **kwargs)


METHODS = {
    "mdpo": (MDPOTrainer, MDPOConfig, {"num_iterations": 2}),
    "copg": (OnlineCoPGTrainer, OnlineCoPGConfig, {}),
    "pf_ppo": (PFPPOTrainer, PFPPOConfig, {"num_iterations": 2, "critic_learning_rate": 1e-2}),
    "pf_ppo-model": (
        ModelCriticTrainer, PFPPOConfig,
        {"num_iterations": 2, "critic": "model", "critic_learning_rate": 3e-3, "strategy": "best_worst"},
    ),
    "pf_ppo-group": (PFPPOTrainer, PFPPOConfig, {"advantage": "group", "strategy": "power", "selection": "resample"}),
    "copg-replay": (OnlineCoPGTrainer, OnlineCoPGConfig, {"replay_prompts": 6, "replay_capacity": 8}),
    "fdpg": (FDPGTrainer, FDPGConfig, {"target": "reward", "beta": 2.0, "baseline": "window"}),
    "fdpg-moments": (
        FDPGTrainer,
        FDPGConfig,
        {
            "target": "distributional", "moments": [2.2], "moment_samples": 32, "moment_samples_per_prompt": 4,
            "divergence": "forward_kl",
        },
    ),
}  # fmt: skip
COMMON = {
    "per_device_train_batch_size": 8, "num_generations": 4, "max_completion_length": 10, "learning_rate": 1e-3,
    "max_steps": 2, "save_strategy": "no", "logging_steps": 1, "report_to": "none", "disable_tqdm": True,
}  # fmt: skip


def prompts(n: int = 12) -> Dataset:
    return Dataset.from_list([{"prompt": f"q{index} ab", "row_id": index} for index in range(n)])


def checksum(prompts, completions, **columns):
    return [sum(map(ord, text)) % 17 / 4 for text in completions]  # never all equal, and no model's favourite


def recorded(trainer_class):
    """The trainer with completions that follow from the prompt alone, the same however they are split over ranks."""

    class Recorded(trainer_class):
        def _generate_single_turn(self, prompt_ids, images, multimodal_fields):
            seen = {}
            completions = []
            for ids in prompt_ids:
                copy = seen[tuple(ids)] = seen.get(tuple(ids), -1) + 1
                rng = random.Random(f"{ids}{copy}")
                length = rng.randint(1, 9)
                own = [rng.randint(4, 200) for _ in range(length)]
                completions.append(own + [1] if rng.random() < 0.7 else own)
            return completions

    return Recorded


def build(
    method, folder, *, model=None, data=None, evaluation=None, reward=checksum, record=False, peft=None, **options
):
    trainer, config, own = METHODS[method]
    if record:
        trainer = recorded(trainer)
    return trainer(
        model if model is not None else tiny.model(),
        reward,
        config(output_dir=str(folder), use_cpu=True, **(COMMON | own | options)),
        train_dataset=data if data is not None else prompts(),
        eval_dataset=evaluation,
        processing_class=tiny.tokenizer(),
        peft_config=peft,
    )


def digest(model) -> str:
    return hashlib.sha256(b"".join(p.detach().numpy().tobytes() for p in model.parameters())).hexdigest()


def rollout(trainer):
    """A micro-batch as the trainer's loss gets it."""
    trainer.model.train()
    return trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))


def independent_logps(model, prompt, completion):
    """Log-probs of a completion's tokens from full logits, alone and without padding."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([prompt + completion])).logits[0].double()
    rows = torch.log_softmax(logits[len(prompt) - 1 : -1], dim=-1)
    return rows[torch.arange(len(completion)), torch.tensor(completion)]
