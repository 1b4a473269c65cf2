"""f-DPG's lambda: solved on samples of the base, prompt by prompt, reported, and kept in checkpoints."""

import copy
import math

import pytest
import torch
from datasets import Dataset

from llmalign.rewards.targets import DistributionalTarget
from llmalign.trainers.fdpg import FDPGTrainer
from llmalign.trainers.fdpg_config import FDPGConfig
from tests.trainers import sampled_runs as runs
from tests.trainers.small_space import (
    SPACE,
    WANTED,
    all_logps,
    has_wanted,
    perturbed,
    small_model,
    small_tokenizer,
    small_trainer,
    starts_low,
)


def test_lambda_is_fitted_reported_and_kept(tmp_path, caplog):
    caplog.set_level("INFO", logger="llmalign")
    options = {
        "reward": [has_wanted, starts_low], "trainer": FDPGTrainer, "target": "distributional", "moments": [0.5, 0.4],
        "moment_samples": 2000, "num_generations": 50, "per_device_train_batch_size": 100, "rows": 4,
    }  # fmt: skip
    trainer = small_trainer(tmp_path, save_strategy="steps", save_steps=1, **options)
    trainer.train()
    report = trainer.moment_report
    assert report.samples == 2000 and report.reached == pytest.approx((0.5, 0.4), abs=1e-6)
    assert "Target: moments 0.5 (reached 0.5000" in caplog.text
    with torch.no_grad():
        base = all_logps(small_model().double())
    features = torch.tensor([[float(WANTED in c), float(c[0] < 3)] for c in SPACE]).double()
    p = torch.softmax(base + features @ torch.tensor(report.lambdas).double(), 0)
    assert (p @ features).tolist() == pytest.approx([0.5, 0.4], abs=0.05)  # lambda was solved on samples
    first = trainer.state.log_history[0]
    assert first["step"] == 0 and first["moments/lambda_1"] == report.lambdas[1] and first["moments/newton_steps"] > 0
    assert "satisfied" not in first and "moment/has_wanted" in trainer.state.log_history[1]
    resumed = small_trainer(tmp_path, max_steps=2, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert resumed.target.lambdas == list(report.lambdas) and resumed.moment_report is None


@pytest.mark.slow
def test_lambda_counts_completions_of_another_model_by_their_weights(tmp_path):
    """The policy starts elsewhere than the base: the moments are still those of the base's tilt."""
    base, policy = small_model(), perturbed(small_model(), size=0.3)
    trainer = FDPGTrainer(
        policy,
        has_wanted,
        FDPGConfig(
            output_dir=str(tmp_path), use_cpu=True, target="distributional", moments=[0.6], moment_samples=6000,
            num_generations=100, per_device_train_batch_size=200, max_completion_length=2, scoring="padded",
            save_strategy="no", report_to="none", disable_tqdm=True,
        ),
        ref_model=copy.deepcopy(base),
        train_dataset=Dataset.from_list([{"prompt": "w2 w3"}] * 4),
        processing_class=small_tokenizer(),
    )  # fmt: skip
    runs.rollout(trainer)
    with torch.no_grad():
        logps = all_logps(base.double())
    share = float(sum(logps[i].exp() for i, completion in enumerate(SPACE) if WANTED in completion))
    exact = math.log(0.6 * (1 - share) / (0.4 * share))
    assert trainer.target.lambdas[0] == pytest.approx(exact, abs=0.15)


def test_moments_are_means_over_prompts(tmp_path):
    """Two prompts, of which one begins with the wanted feature nearly always and the other nearly never."""

    def by_prompt(prompts, completions, completion_ids, **columns):
        liked = {"w2 w3": {2}, "w4 w5": {0, 2, 3, 4, 5}}
        return [float(ids[0] in liked[prompt]) for prompt, ids in zip(prompts, completion_ids, strict=True)]

    args = FDPGConfig(
        output_dir=str(tmp_path), use_cpu=True, target="distributional", moments=[0.7], moment_samples=8000,
        moment_samples_per_prompt=1000, num_generations=100, per_device_train_batch_size=200, max_completion_length=2,
        scoring="padded", save_strategy="no", report_to="none", disable_tqdm=True,
    )  # fmt: skip
    trainer = FDPGTrainer(
        small_model(), by_prompt, args, processing_class=small_tokenizer(),
        train_dataset=Dataset.from_list([{"prompt": prompt} for prompt in ("w2 w3", "w4 w5")]),
    )  # fmt: skip
    runs.rollout(trainer)
    assert trainer.moment_report.contexts == 2 and trainer.moment_report.samples == 8000
    model, means = small_model(), []
    for prompt, liked in (([2, 3], {2}), ([4, 5], {0, 2, 3, 4, 5})):
        logps = torch.stack([runs.independent_logps(model, prompt, own).sum() for own in SPACE])
        features = torch.tensor([float(own[0] in liked) for own in SPACE]).double()
        means.append(float((torch.softmax(logps + trainer.target.lambdas[0] * features, 0) * features).sum()))
    assert abs(means[0] - means[1]) > 0.1 and sum(means) / 2 == pytest.approx(0.7, abs=0.03)


@pytest.mark.parametrize(("groups", "prompts"), [(16, 4), (18, 4), (3, 1)])
def test_each_prompt_that_lambda_is_solved_on_has_its_completions(groups, prompts, tmp_path):
    trainer = runs.build("fdpg-moments", tmp_path, moment_samples_per_prompt=16)  # four groups of four
    drawn = [row["prompt"] for row in trainer._prompts_to_fit(groups)]
    counts = {prompt: drawn.count(prompt) for prompt in drawn}
    assert len(drawn) == groups and len(counts) == prompts and min(counts.values()) >= min(4, groups)


def test_too_few_completions_of_each_prompt_show(tmp_path, caplog):
    """The true moments are off on the other side by about as much as those of the halves."""
    caplog.set_level("WARNING", logger="llmalign")
    found = {}
    for each in (10, 1000):
        target, gaps = DistributionalTarget([0.5]), []
        for seed in range(5):
            generator = torch.Generator().manual_seed(seed)
            features = (torch.rand(4000, generator=generator) < 0.1).double()
            report = target.fit(features, None, torch.arange(4000) // each)
            odds = 0.1 / 0.9 * math.exp(target.lambdas[0])
            gaps.append((odds / (1 + odds) - 0.5, report.biased))
        found[each] = [sum(column) / len(gaps) for column in zip(*gaps, strict=True)]
    assert found[10][0] > 0.1 and found[10][1] > 0.05
    assert abs(found[1000][0]) < 0.02 and found[1000][1] < 0.01
