"""The page of a model on the Hub: what was trained, how, on what, and what was measured."""

import json
import re
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from llmalign import assets
from llmalign.errors import UserError
from llmalign.hub.cleaning import cleaned, read_json
from llmalign.hub.names import check_base, is_hub_name
from llmalign.hub.staging import CURVES, EVALUATION, METRICS, RUN, base_of, kind_of

PAGE_OF = {"copg_online": "copg", "pso_offline": "pso"}  # of a method whose page has another name
SHOWN = (
    "beta", "eta", "tau", "flip_rate", "alpha", "loss", "learning_rate", "lr_scheduler_type", "warmup_ratio",
    "num_train_epochs", "max_steps", "per_device_train_batch_size", "gradient_accumulation_steps", "world_size",
    "max_length", "optim", "weight_decay", "max_grad_norm", "use_peft", "lora_r", "lora_alpha", "load_in_4bit", "bf16",
    "seed", "data_seed",
)  # fmt: skip
USE = {
    "model": """\
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{repo}")
tokenizer = AutoTokenizer.from_pretrained("{repo}")""",
    "adapter": """\
from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer

model = AutoPeftModelForCausalLM.from_pretrained("{repo}")  # on {base}
tokenizer = AutoTokenizer.from_pretrained("{repo}")""",
    "reward": """\
from transformers import AutoModelForSequenceClassification, AutoTokenizer

model = AutoModelForSequenceClassification.from_pretrained("{repo}")
tokenizer = AutoTokenizer.from_pretrained("{repo}")""",
    "reward_adapter": """\
from peft import AutoPeftModelForSequenceClassification
from transformers import AutoTokenizer

model = AutoPeftModelForSequenceClassification.from_pretrained("{repo}", num_labels=1)  # on {base}
tokenizer = AutoTokenizer.from_pretrained("{repo}")""",
    "pipeline": """\
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained("{repo}")
image = pipe("a prompt").images[0]""",
    "image_adapter": """\
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained("{base}")
pipe.load_lora_weights("{repo}")
image = pipe("a prompt").images[0]""",
}
LIBRARY = {
    "model": "transformers", "adapter": "peft", "reward": "transformers", "reward_adapter": "peft",
    "pipeline": "diffusers", "image_adapter": "diffusers",
}  # fmt: skip
TASK = {
    "model": "text-generation", "adapter": "text-generation", "reward": "text-classification",
    "reward_adapter": "text-classification", "pipeline": "text-to-image", "image_adapter": "text-to-image",
}  # fmt: skip
LIBRARIES = ("llmalign", "torch", "transformers", "trl", "peft", "datasets")


def write_card(run: Path, repo: str, *, license: str | None = None, base: str | None = None) -> str:
    """The text of a run's README.md: the same for the same run, without paths of this machine and without secrets.

    `license` None states none; `base` is the base's name on the Hub. What a run does not record is left out. Raises
    UserError for a record that is half-written, and for a `base` that is no name on the Hub.
    """
    check_base(base)
    kind = _kind(run)
    # A checkpoint's recipe lies above it.
    above = run.parent if run.name.startswith("checkpoint-") and not (run / RUN).is_file() else run
    recipe, metrics, evaluation = _read(above / RUN), _read(run / METRICS), _read(run / EVALUATION)
    method = str(recipe.get("method") or metrics.get("method") or "")
    named = recipe.get("model_name_or_path") or cleaned(base_of(run, kind_of(run))) or metrics.get("model")
    start = base or str(named or "")
    results = _told(run / EVALUATION, _results, evaluation)
    data = recipe.get("dataset_name")
    head = ModelCardData(
        license=license,
        library_name=LIBRARY[kind],
        pipeline_tag=TASK[kind],
        base_model=start if base or is_hub_name(start) else None,
        datasets=[data] if isinstance(data, str) and is_hub_name(data) else None,
        tags=["llmalign", *([method] if method else []), *(["lora"] if "adapter" in kind else [])],
        model_name=repo.split("/")[-1] if results else None,
        eval_results=results,
    )
    parts = [
        f"# {repo.split('/')[-1]}", _what(kind, method, start), _use(kind, repo, start),
        _method(method), _told(run / METRICS, _data, recipe, metrics), _values(recipe),
        _told(run / METRICS, _measured, metrics), _told(run / EVALUATION, _judged, evaluation),
        f"## Curves\n\n![curves]({CURVES})" if (run / CURVES).is_file() else "",
        _told(run / EVALUATION, _versions, evaluation),
    ]  # fmt: skip
    text = f"---\n{head.to_yaml()}\n---\n\n" + "\n\n".join(part for part in parts if part) + "\n"
    ModelCard(text)  # which raises for front matter that is none
    return text


def _kind(run: Path) -> str:
    """As `kind_of`, with reward models, which other classes load, told from language models."""
    kind = kind_of(run)
    if kind == "model":
        classes = read_json(run / "config.json").get("architectures") or []
        return "reward" if any(name.endswith("ForSequenceClassification") for name in classes) else kind
    if kind == "adapter":
        return "reward_adapter" if read_json(run / "adapter_config.json").get("task_type") == "SEQ_CLS" else kind
    return kind


def _told(path: Path, write: Callable[..., Any], *records: dict[str, Any]) -> Any:
    """What `write` makes of records; UserError for one that lacks what it should have."""
    try:
        return write(*records)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(
            f"{path} is not as llmalign writes it ({type(error).__name__}: {error}): write it anew, or remove it"
        ) from error


def _results(evaluation: dict[str, Any]) -> list[EvalResult] | None:
    rate = (evaluation.get("winrate") or {}).get("win_rate")
    if rate is None:
        return None
    return [
        EvalResult(
            task_type="text-generation", dataset_type="preference", dataset_name=_source(evaluation),
            metric_type="win_rate", metric_name=f"win rate against {evaluation['reference']}, %",
            metric_value=round(rate, 2),
        )
    ]  # fmt: skip


def _use(kind: str, repo: str, start: str) -> str:
    return f"```python\n{USE[kind].format(repo=repo, base=start)}\n```"


def _what(kind: str, method: str, start: str) -> str:
    things = {
        "model": "A language model", "adapter": "A LoRA adapter of a language model", "pipeline": "An image pipeline",
        "image_adapter": "LoRA weights of an image pipeline", "reward": "A reward model",
        "reward_adapter": "A LoRA adapter of a reward model",
    }  # fmt: skip
    by = f", trained with {method}" if method else ""
    return f"{things[kind]}{by}{f' from {start}' if start else ''} by llmalign."


def _method(method: str) -> str:
    """Title, paper and equation from the method's own page."""
    page = assets.root() / "trainers" / PAGE_OF.get(method, method) / "README.md"
    if not method or not page.is_file():
        return ""
    text = page.read_text(encoding="utf-8")
    title = text.split("\n", 1)[0].removeprefix("# ")
    paper = re.search(r"\[arXiv [\d.]+\]\(https://arxiv\.org/abs/[\d.]+\)", text)
    equation = re.search(r"\$\$.+?\$\$", text, re.DOTALL)
    loss = re.search(r"^\| loss \| (.+?) \|$", text, re.MULTILINE)
    lines = [f"## Method\n\n{title}{f', {paper[0]}' if paper else ''}."]
    lines += [equation[0]] if equation else []
    lines += [f"Computed by {loss[1]}."] if loss else []
    return "\n\n".join(lines)


def _data(recipe: dict[str, Any], metrics: dict[str, Any]) -> str:
    name = recipe.get("dataset_name")
    if name is None:
        return ""
    shown = name if isinstance(name, str) else json.dumps(name)
    rows = {
        split: report.get("rows") for split, report in (metrics.get("data") or {}).items() if isinstance(report, dict)
    }
    counted = ", ".join(f"{count} rows ({split})" for split, count in rows.items() if count is not None)
    digest = recipe.get("train_rows_sha256")
    parts = [f"`{shown}`", counted, f"SHA-256 of the training rows {digest}" if digest else ""]
    return "## Data\n\n" + "; ".join(part for part in parts if part) + "."


def _values(recipe: dict[str, Any]) -> str:
    shown = [key for key in SHOWN if recipe.get(key) is not None and recipe[key] is not False]
    if not recipe.get("use_peft"):
        shown = [key for key in shown if not key.startswith("lora_")]
    lines = [f"| {key} | {recipe[key]} |" for key in shown]
    return "\n".join(["## Values", "", "| | |", "|---|---|", *lines]) if lines else ""


def _measured(metrics: dict[str, Any]) -> str:
    before, after = metrics.get("before") or {}, metrics.get("after") or {}
    lines = [f"| {key} | {_number(before.get(key))} | {_number(value)} |" for key, value in after.items()]
    if not lines:
        return ""
    head = [f"## Measured on held-out rows, {metrics.get('steps')} steps", "", "| | before | after |", "|---|---|---|"]
    return "\n".join([*head, *lines])


def _judged(evaluation: dict[str, Any]) -> str:
    rate, interval, accuracy = (evaluation.get(key) for key in ("winrate", "interval", "accuracy"))
    lines = []
    if rate and interval:
        judge = (evaluation.get("judge") or {}).get("name")
        lines.append(f"| win rate against {evaluation['reference']}, %, judged by {judge} | {_interval(interval, 1)} |")
        if rate.get("length_controlled_winrate") is not None:
            lines.append(f"| length-controlled | {rate['length_controlled_winrate']:.2f} |")
        lines.append(f"| judged answers | {rate['n_rows']} of {_source(evaluation)} |")
    if accuracy:
        kind = "pairs of the training data" if accuracy.get("trained_on") else "pairs"
        lines.append(f"| preference accuracy on {accuracy['n']} {kind}, % | {_interval(accuracy, 100)} |")
    for task, metrics in (evaluation.get("benchmarks") or {}).items():
        lines += [f"| {task}, {name} | {_number(value)} |" for name, value in metrics.items()]
    said = [f"- {warning}" for warning in (rate or {}).get("warnings", ())]
    if not lines:
        return ""
    return "\n".join(
        ["## Evaluation", "", "| | with 95 % interval |", "|---|---|", *lines, *([""] + said if said else [])]
    )


def _versions(evaluation: dict[str, Any]) -> str:
    """As the evaluation records them, else those that the card is written with."""
    when = "evaluated" if evaluation.get("versions") else "pushed"
    known = evaluation.get("versions") or {name: version(name) for name in LIBRARIES}
    named = ", ".join(f"{name} {number}" for name, number in known.items() if number)
    return f"## Versions\n\nWhen it was {when}: {named}."


def _interval(estimate: dict[str, Any], scale: float) -> str:
    mean, low, high = (scale * estimate[key] for key in ("mean", "low", "high"))
    return f"{mean:.2f} [{low:.2f}, {high:.2f}]"


def _number(value: Any) -> str:
    return (
        f"{value:.4g}"
        if isinstance(value, int | float) and not isinstance(value, bool)
        else ""
        if value is None
        else str(value)
    )


def _source(evaluation: dict[str, Any]) -> str:
    return str((evaluation.get("prompts") or {}).get("source") or "prompts")


def _read(path: Path) -> dict[str, Any]:
    """A record of the run, cleaned; empty where there is none."""
    if not path.is_file():
        return {}
    found = cleaned(read_json(path))
    return found if isinstance(found, dict) else {}
