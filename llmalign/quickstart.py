"""`llmalign quickstart`: build a small model, teach it, align it with RPO and with DPO, measure both; no download."""

import json
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import track
from rich.table import Table
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase, ProgressCallback

from llmalign import PairConfig, PairTrainer, RPOConfig, RPOTrainer, SFTConfig, SFTTrainer
from llmalign import embedded as world
from llmalign.embedded.tiny import one_thread
from llmalign.evaluation import Estimate, WinRate, bootstrap_mean, length_matched, win_rate
from llmalign.evaluation.divergence import sampled_kl
from llmalign.evaluation.plots import plot_training
from llmalign.scores.sampling import sample_completions
from llmalign.scores.text import sequence_logps
from llmalign.screen import LossBar, quiet
from llmalign.trainers import prepare_pairs

MAX_LENGTH = 128  # tokens; the longest row of the world has about 100
NEXT_COMMAND = (
    "llmalign train trainers/rpo/recipe.yaml --model_name_or_path Qwen/Qwen2.5-0.5B-Instruct "
    "--dataset_name trl-lib/ultrafeedback_binarized"
)


@dataclass(frozen=True)
class Settings:
    """Sizes of the run; the defaults take about three minutes of one core, smaller ones are for tests.

    Both methods see the same pairs in the same order, and each has a learning rate of its own. DPO's was chosen from
    1e-4, 2e-4, 3e-4 and 5e-4 by its win rate on seed 0, which hardly differs between them.
    """

    sft_steps: int = 700
    sft_batch: int = 16
    sft_rate: float = 5e-3
    pairs: int = 1600
    held_out_pairs: int = 300
    curve_pairs: int = 120
    pair_steps: int = 200
    pair_batch: int = 16
    beta: float = 0.1
    eta: float = 0.5
    rpo_rate: float = 1e-3
    dpo_rate: float = 2e-4
    prompts: int = 216
    answers: int = 2
    new_tokens: int = 80
    temperature: float = 0.7


@dataclass(frozen=True)
class Answers:
    """What one model says to the held-out prompts: `answers` texts a prompt, prompt by prompt."""

    prompts: list[str]
    texts: list[str]


@dataclass(frozen=True)
class Measured:
    """What is known of one model; comparisons are with the SFT model that both start from, so it has none itself."""

    score: Estimate
    words: Estimate
    broken: Estimate
    logp_accuracy: Estimate
    margin_accuracy: Estimate | None = None
    chosen_drift: Estimate | None = None
    kl: Estimate | None = None
    win_rate: WinRate | None = None
    matched_win_rate: WinRate | None = None


def main(output_dir: str | Path = "runs/quickstart", seed: int = 0, settings: Settings | None = None) -> dict[str, Any]:
    """Run the quickstart and return its results.

    Models, results.json, answers.jsonl and curves.png go into `output_dir`. What an earlier quickstart left there is
    replaced. Everything is drawn from `seed`.
    """
    settings = settings or Settings()
    folder, began = Path(output_dir), time.perf_counter()
    console = Console(width=None if sys.stdout.isatty() else 100)
    folder.mkdir(parents=True, exist_ok=True)
    with quiet(), one_thread():
        console.print("[bold]1/4[/] Building the tokenizer and a small Llama; SFT on the world's sample answers")
        tokenizer, history = teach(folder / "sft", seed, settings)
        console.print("[bold]2/4[/] Aligning with RPO, and with DPO from the same start")
        pairs = Dataset.from_list(world.pair_rows(settings.pairs, seed))
        held_out = Dataset.from_list(world.pair_rows(settings.held_out_pairs, seed, subset=world.split()[1]))
        pairs, held_out = (prepare_pairs(rows, tokenizer, max_length=MAX_LENGTH) for rows in (pairs, held_out))
        data = pairs, held_out.select(range(settings.curve_pairs))
        histories = {}
        for method in ("rpo", "dpo"):
            histories[method], data = align(method, folder, tokenizer, data, seed, settings)
        console.print("[bold]3/4[/] Answering held-out prompts, judged by the ground truth")
        answers, measured = measure_all(folder, tokenizer, held_out, seed, settings)
        console.print("[bold]4/4[/] Drawing the training curves")
        curves = plot_training(
            {name.upper(): entries for name, entries in histories.items()},
            folder / "curves.png",
            title="Aligning the embedded model",
        )
    results: dict[str, Any] = {
        "seed": seed,
        "settings": asdict(settings),
        "seconds": round(time.perf_counter() - began, 1),
        "models": {name: asdict(entry) for name, entry in measured.items()},
        "histories": {"sft": history, **histories},
    }
    # JSON has no NaN: where there was nothing to measure it says null.
    results = json.loads(json.dumps(results), parse_constant=lambda _: None)
    (folder / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    _write_answers(folder / "answers.jsonl", answers)
    _show(console, measured, answers)
    console.print(f"Curves: {curves}   Models and results: {folder}   Time: {results['seconds']:.0f} s")
    console.print("\nThe same with a real model and real preferences:")
    console.print(f"  {NEXT_COMMAND}", soft_wrap=True, highlight=False)
    return results


def teach(folder: Path, seed: int, settings: Settings) -> tuple[PreTrainedTokenizerBase, list[dict[str, float]]]:
    """SFT of a fresh model on fresh rows (each seen once), saved in `folder`; the tokenizer and the log history."""
    tokenizer = world.build_tokenizer()
    rows = world.sft_rows(settings.sft_steps * settings.sft_batch, seed)
    args = SFTConfig(
        output_dir=str(folder),
        max_steps=settings.sft_steps,
        per_device_train_batch_size=settings.sft_batch,
        learning_rate=settings.sft_rate,
        warmup_steps=30,
        lr_scheduler_type="cosine",
        max_length=None,
        train_sampling_strategy="group_by_length",
        **_common(seed),
    )
    trainer = SFTTrainer(
        world.build_model(tokenizer, seed=seed),
        args=args,
        train_dataset=Dataset.from_list(_tokenized(rows, tokenizer)),
        processing_class=tokenizer,
    )
    return tokenizer, _train(trainer, folder)


def align(
    method: str,
    folder: Path,
    tokenizer: PreTrainedTokenizerBase,
    data: tuple[Dataset, Dataset],
    seed: int,
    settings: Settings,
) -> tuple[list[dict[str, float]], tuple[Dataset, Dataset]]:
    """Train `rpo` or `dpo` from `folder`/sft on train and held-out pairs, and save the model in `folder`/method.

    Returns the log history and the data with the reference's log-probs in columns, so that they are computed once.
    """
    common: dict[str, Any] = {
        "output_dir": str(folder / method),
        "max_steps": settings.pair_steps,
        "per_device_train_batch_size": settings.pair_batch,
        "per_device_eval_batch_size": 2 * settings.pair_batch,
        "beta": settings.beta,
        "max_length": MAX_LENGTH,
        "warmup_steps": 15,
        "lr_scheduler_type": "linear",
        "eval_strategy": "steps",
        "eval_steps": max(1, settings.pair_steps // 5),
        "eval_on_start": True,
        "precompute_ref_log_probs": True,
        "alarm_new_tokens": settings.new_tokens,
        **_common(seed),
    }
    given: dict[str, Any] = {"train_dataset": data[0], "eval_dataset": data[1], "processing_class": tokenizer}
    start = str(folder / "sft")
    trainer: Any
    if method == "rpo":
        trainer = RPOTrainer(
            start, args=RPOConfig(eta=settings.eta, learning_rate=settings.rpo_rate, **common), **given
        )
    else:
        trainer = PairTrainer(start, args=PairConfig(loss="dpo", learning_rate=settings.dpo_rate, **common), **given)
    return _train(trainer, folder / method), (trainer.train_dataset, trainer.eval_dataset)


def _common(seed: int) -> dict[str, Any]:
    return {
        "seed": seed,
        "data_seed": seed,
        "adam_beta2": 0.98,
        "logging_steps": 10,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": False,
    }


def _tokenized(rows: Sequence[dict[str, str]], tokenizer: PreTrainedTokenizerBase) -> list[dict[str, list[int]]]:
    """SFT rows as TRL would prepare them, all at once: labels on the completion and the end of text alone."""
    prompts = tokenizer([row["prompt"] for row in rows])["input_ids"]
    completions = tokenizer([row["completion"] + tokenizer.eos_token for row in rows])["input_ids"]
    return [
        {"input_ids": prompt + completion, "labels": [-100] * len(prompt) + completion}
        for prompt, completion in zip(prompts, completions, strict=True)
    ]


def _train(trainer: Any, folder: Path) -> list[dict[str, float]]:
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(LossBar)
    trainer.train()
    trainer.save_model(str(folder))
    return trainer.state.log_history


def measure_all(
    folder: Path, tokenizer: PreTrainedTokenizerBase, held_out: Dataset, seed: int, settings: Settings
) -> tuple[dict[str, Answers], dict[str, Measured]]:
    """Let SFT, RPO and DPO answer the held-out prompts and measure each; the answers and the numbers by model."""
    prompts = [prompt.text for prompt in world.split()[1][: settings.prompts] for _ in range(settings.answers)]
    models = {name: AutoModelForCausalLM.from_pretrained(folder / name) for name in ("sft", "rpo", "dpo")}
    prompt_ids = tokenizer(prompts)["input_ids"]
    answers, measured = {}, {}
    for name, model in models.items():
        drawing: dict[str, Any] = {"max_new_tokens": settings.new_tokens, "batch_size": 72}
        tokens = sample_completions(
            model,
            tokenizer,
            prompt_ids,
            temperature=settings.temperature,
            seed=seed,
            progress=_bar(f"{name.upper()}: answers"),
            **drawing,
        )
        answers[name] = Answers(prompts, tokenizer.batch_decode(tokens, skip_special_tokens=True))
        drawing |= {"seed": seed + 1, "progress": _bar(f"{name.upper()}: KL")}
        kl = None if name == "sft" else sampled_kl(model, models["sft"], tokenizer, prompt_ids, **drawing)
        pair_logps = [_pair_logps(one, tokenizer, held_out) for one in (model, models["sft"])]
        measured[name] = measure(answers[name], answers["sft"], pair_logps, held_out["prompt"], kl)
    return answers, measured


def _bar(description: str) -> Callable[[Iterable[int]], Iterable[int]]:
    return lambda starts: track(list(starts), description)


def _pair_logps(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, pairs: Dataset) -> list[Any]:
    """Log-probs, (N,) each, of the chosen and of the rejected responses of prepared pairs."""
    sides = [list(zip(pairs["prompt_ids"], pairs[side], strict=True)) for side in ("chosen_ids", "rejected_ids")]
    return [sequence_logps(model, side, pad_token_id=tokenizer.pad_token_id, batch_size=64) for side in sides]


def measure(
    own: Answers,
    start: Answers,
    pair_logps: Sequence[Sequence[Any]],
    pair_prompts: Sequence[str],
    kl: Estimate | None,
) -> Measured:
    """Put one model's answers and log-probs of held-out pairs beside the SFT model's (second in `pair_logps`).

    Each answer is compared with each SFT answer to the same prompt; intervals draw whole prompts.
    """
    traits = [world.traits(prompt, text) for prompt, text in zip(own.prompts, own.texts, strict=True)]
    (chosen, rejected), (start_chosen, start_rejected) = pair_logps

    def over_prompts(values: Any) -> Estimate:
        return bootstrap_mean(list(values), own.prompts)

    def over_pairs(values: Any) -> Estimate:
        return bootstrap_mean(values.tolist(), pair_prompts)

    common: dict[str, Any] = {
        "score": over_prompts(entry.total for entry in traits),
        "words": over_prompts(len(text.split()) for text in own.texts),
        "broken": over_prompts(world.broken_share(text) for text in own.texts),
        "logp_accuracy": over_pairs((chosen > rejected).float()),
    }
    if kl is None:
        return Measured(**common)
    compared = [
        (prompt, text, other)
        for prompt, text in zip(own.prompts, own.texts, strict=True)
        for asked, other in zip(start.prompts, start.texts, strict=True)
        if asked == prompt
    ]
    prompts = [prompt for prompt, _, _ in compared]
    outcomes = [world.preference(*entry) for entry in compared]
    lengths, other_lengths = ([len(entry[side].split()) for entry in compared] for side in (1, 2))
    return Measured(
        **common,
        margin_accuracy=over_pairs(((chosen - start_chosen) > (rejected - start_rejected)).float()),
        chosen_drift=over_pairs(chosen - start_chosen),
        kl=kl,
        win_rate=win_rate(outcomes, prompts),
        matched_win_rate=length_matched(outcomes, lengths, other_lengths, prompts),
    )


def _write_answers(path: Path, answers: dict[str, Answers]) -> None:
    rows = [
        {"model": name, "prompt": prompt, "answer": text, "score": world.score(prompt, text)}
        for name, entry in answers.items()
        for prompt, text in zip(entry.prompts, entry.texts, strict=True)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def _show(console: Console, measured: dict[str, Measured], answers: dict[str, Answers]) -> None:
    """Print the table of numbers and three prompts with the answers before and after."""
    table = Table(title="Held-out prompts and pairs, 95 % intervals in brackets", title_justify="left", box=SIMPLE_HEAD)
    table.add_column("", no_wrap=True)
    for name in measured:
        table.add_column(name.upper(), justify="right", no_wrap=True)
    for label, field, scale, digits in (
        ("win rate over SFT, %", "win_rate", 100, 1),
        ("  at like length, %", "matched_win_rate", 100, 1),
        ("true score of 4.5", "score", 1, 2),
        ("pair accuracy, %", "margin_accuracy", 100, 1),
        ("  by log-probs, %", "logp_accuracy", 100, 1),
        ("words an answer", "words", 1, 1),
        ("broken sentences, %", "broken", 100, 1),
        ("chosen drift, nats", "chosen_drift", 1, 1),
        ("KL to SFT, nats", "kl", 1, 1),
    ):
        values = [vars(entry)[field] for entry in measured.values()]
        table.add_row(label, *("-" if value is None else value.text(scale=scale, digits=digits) for value in values))
    console.print(table)
    start = answers["sft"]
    console.print("Three held-out prompts, first answer of each model, [dim]score in brackets (best 4.5)[/]:")
    for place in (len(start.prompts) * part // 6 for part in (1, 3, 5)):
        prompt = start.prompts[place]
        console.print(f"\n[bold]{prompt.strip()}[/]")
        for name in ("sft", "rpo"):
            text = answers[name].texts[place]
            console.print(f"  {name.upper()}: [{world.score(prompt, text):.1f}] {text}", markup=False, highlight=False)
    console.print()
