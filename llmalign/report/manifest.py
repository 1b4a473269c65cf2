"""What a run was made of: its recipe without secrets, versions, data, and all that was measured before and after."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llmalign.report.charts import symbol
from llmalign.report.collect import READ, Run
from llmalign.report.markup import Html, el, listing, mapping, number, say, table
from llmalign.report.summary import duration

CORE = (
    "method", "model_name_or_path", "ref_model_name_or_path", "dataset_name", "beta", "eta", "tau", "loss_type",
    "learning_rate", "lr_scheduler_type", "max_steps", "num_train_epochs", "per_device_train_batch_size",
    "gradient_accumulation_steps", "world_size", "max_length", "dtype", "use_peft", "lora_r", "seed", "rounds",
)  # fmt: skip
NEVER_SAME = frozenset({"output_dir", "run_name", "logging_dir"})


def manifests(runs: Sequence[Run]) -> Html:
    """A searchable manifest of each run, and before them the keys in which their recipes differ."""
    search = el(
        "label", "Find a key or a value",
        el("input", type="search", id="recipe-search", placeholder="learning_rate", autocomplete="off"),
        cls="controls wide",
    )  # fmt: skip
    parts = [search, _differences(runs), *(_manifest(run, place) for place, run in enumerate(runs))]
    return el("div", [part for part in parts if part], cls="manifests")


def plain(value: Any) -> str:
    """A recipe's value as a cell holds it."""
    if value is None:
        return "–"
    if isinstance(value, str):
        return value
    return json.dumps(value, ensure_ascii=False)


def _manifest(run: Run, place: int) -> Html:
    recipe = run.recipe
    core = [[key, plain(recipe[key])] for key in CORE if recipe.get(key) is not None]
    rest = [[key, plain(recipe[key])] for key in sorted(recipe) if key not in CORE or recipe[key] is None]
    parts: list[Any] = [
        el("p", el("code", str(run.path)), cls="faint"),
        _titled("Recipe", table(["key", "value"], core, cls="recipe")) if core else None,
        el("details", el("summary", f"The other {len(rest)} keys of the recipe"),
           table(["key", "value"], rest, cls="recipe"), cls="values") if rest else None,
        _titled("Evaluation", table(None, _evaluation(run), cls="recipe")) if run.evaluation else None,
        _titled("Data", _data(run)) if mapping(run.metrics.get("data")) else None,
        _titled("Before and after", _measured(run)) if mapping(run.metrics.get("after")) else None,
        _titled("Versions", table(["library", "version"], _versions(run))) if _versions(run) else None,
        _titled("Files read", table(["file", "bytes"], _files(run.path))) if run.path.is_dir() else None,
    ]  # fmt: skip
    title = el("summary", symbol(place), run.name)
    return el("details", title, el("div", parts, cls="body"), cls="manifest")


def _titled(title: str, content: Html) -> Html:
    return el("div", el("h4", title), content)


def _differences(runs: Sequence[Run]) -> Html | None:
    recipes = [run.recipe for run in runs if run.recipe]
    names = [run.name for run in runs if run.recipe]
    if len(recipes) < 2:
        return None
    keys = sorted({key for recipe in recipes for key in recipe} - NEVER_SAME, key=lambda key: (key not in CORE, key))
    cells = {key: [plain(recipe.get(key)) for recipe in recipes] for key in keys}
    rows = [[key, *own] for key, own in cells.items() if len(set(own)) > 1]
    if not rows:
        return el("p", "The recipes of all runs are the same.", cls="note")
    return el("div", el("h3", "Where the recipes differ"), table(["key", *names], rows, cls="recipe"))


def _evaluation(run: Run) -> list[list[Any]]:
    found = run.evaluation
    judge, prompts = mapping(found.get("judge")), mapping(found.get("prompts"))
    rows: list[list[Any]] = [
        ["model", found.get("model")], ["reference", found.get("reference")],
        ["judge", ", ".join(f"{key} {plain(value)}" for key, value in judge.items() if value is not None)],
        ["prompts", ", ".join(f"{key} {plain(value)}" for key, value in prompts.items() if value is not None)],
        ["made", found.get("created")],
    ]  # fmt: skip
    for key, value in mapping(mapping(found.get("winrate"))).items():
        if number(value) is not None:
            rows.append([key, say(number(value))])
    for task, metrics in mapping(found.get("benchmarks")).items():
        said = ", ".join(f"{name} {say(number(value))}" for name, value in mapping(metrics).items() if number(value))
        rows.append([f"benchmark {task}", said])
    for warning in listing(mapping(found.get("winrate")).get("warnings")):
        rows.append(["note", str(warning)])
    return [[name, str(value)] for name, value in rows if value not in (None, "")]


def _data(run: Run) -> Html:
    rows = []
    for name, report in mapping(run.metrics.get("data")).items():
        found = [
            f"{key} {mapping(own).get('count')}"
            for key, own in mapping(mapping(report).get("findings")).items()
            if mapping(own).get("count")
        ]
        notes = [str(note) for note in listing(mapping(report).get("notes"))]
        counts = [say(number(mapping(report).get(key)), 0) for key in ("rows", "prepared_rows")]
        rows.append([name, str(mapping(report).get("kind") or ""), *counts, "; ".join(found + notes) or "nothing"])
    return table(["set", "kind", "rows", "used", "found by the doctor"], rows)


def _measured(run: Run) -> Html:
    before, after = mapping(run.metrics.get("before")), mapping(run.metrics.get("after"))
    rows = [[key, say(number(before.get(key))), say(number(after[key]))] for key in after]
    seconds = number(run.metrics.get("seconds"))
    caption = "held-out data" + (f"; the run took {duration(seconds)}" if seconds is not None else "")
    return table(["measured", "before", "after"], rows, caption=caption, cls="numbers")


def _versions(run: Run) -> list[list[str]]:
    return [[str(name), str(version or "not installed")]
            for name, version in mapping(run.evaluation.get("versions")).items()]  # fmt: skip


def _files(path: Path) -> list[list[str]]:
    files = [path / name for name in READ] + [path / "evaluation" / name for name in READ]
    return [[str(file.relative_to(path)), f"{file.stat().st_size:,}"] for file in files if file.is_file()]
