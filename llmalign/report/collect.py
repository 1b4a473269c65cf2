"""What the named folders and files hold: every file read on its own, so that a broken one costs nothing but itself."""

import json
import os
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llmalign.errors import UserError
from llmalign.evaluation.annotations import Row, known_preference, read_annotations, read_rows
from llmalign.report.markup import listing, mapping, number
from llmalign.secrets import hidden

RECIPE, METRICS, STATE, EVALUATION, ANNOTATIONS, ROUNDS, LOOP, IMAGES, GRID, RELIABILITY = (
    "run.json", "metrics.json", "trainer_state.json", "evaluation.json", "annotations.json", "rounds.json",
    "loop.json", "images.jsonl", "grid.png", "reliability.json",
)  # fmt: skip
READ = (RECIPE, METRICS, STATE, EVALUATION, ANNOTATIONS, ROUNDS, LOOP, IMAGES, GRID, RELIABILITY)
EVALUATED, SAMPLED, START = "evaluation", "samples", "start"
ROWS_END = re.compile(r"\.(json|jsonl|ndjson)(\.gz)?$")
CHECKPOINT = re.compile(r"checkpoint-(\d+)")
ROUND = re.compile(r"round-(\d+)")
History = list[dict[str, Any]]


@dataclass(frozen=True)
class Pictures:
    """A prompt and its images, and those of the model before training where they lie beside them."""

    prompt: str
    images: list[Path]
    start: list[Path]


@dataclass
class Run:
    """One named folder or file; what it does not hold is empty. `faults` are sentences about what cannot be read."""

    name: str
    path: Path
    recipe: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, Any] = field(default_factory=dict)
    history: History = field(default_factory=list)
    evaluation: dict[str, Any] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)
    rounds: dict[str, Any] = field(default_factory=dict)
    pictures: list[Pictures] = field(default_factory=list)
    grid: Path | None = None
    reliability: dict[str, Any] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)

    @property
    def trained(self) -> bool:
        """Whether a training run left anything here."""
        return bool(self.recipe or self.metrics or self.history or self.rounds)

    @property
    def judged(self) -> bool:
        """Whether there is a win rate."""
        return number(mapping(self.evaluation.get("winrate")).get("win_rate")) is not None

    @property
    def shown(self) -> bool:
        """Whether there is anything at all."""
        found = (self.trained, self.evaluation, self.rows, self.pictures, self.grid, self.reliability)
        return any(bool(one) for one in found)

    @property
    def method(self) -> str | None:
        """The method's name, where a recipe or a result says it."""
        found = self.recipe.get("method") or self.metrics.get("method") or self.rounds.get("method")
        return None if found is None else str(found)

    @property
    def start(self) -> str | None:
        """The model that training started from."""
        found = self.recipe.get("model_name_or_path") or self.metrics.get("model") or self.rounds.get("model")
        return None if found is None else str(found)


def collect(paths: Sequence[str | Path]) -> list[Run]:
    """Read every RUN (a folder of train, evaluate, iterate or sample, or a file of annotations or of reliability).

    Runs get names that tell them apart. What cannot be read is a sentence in `faults`. Raises UserError for a path that
    is not there or named twice, and where none of them holds anything to report.
    """
    folders = [Path(path).expanduser() for path in paths]
    for path in folders:
        if not path.exists():
            raise UserError(f"{path} is not there: name a run's folder, or a file of annotations.")
    resolved = [Path(os.path.abspath(path)) for path in folders]
    for path in resolved:
        if resolved.count(path) > 1:
            raise UserError(f"{path} is named twice: name each run once.")
    names = _names(resolved)
    runs = [
        _folder(name, path, whole) if path.is_dir() else _file(name, path)
        for name, path, whole in zip(names, folders, resolved, strict=True)
    ]
    if not any(run.shown for run in runs):
        said = next((fault for run in runs for fault in run.faults), None)
        raise UserError(said or f"There is nothing to report in {folders[0]}: it holds none of {', '.join(READ)}.")
    for run in runs:
        if not run.shown and not run.faults:
            run.faults.append(f"{run.path} holds nothing that a report shows")
    return runs


def _folder(name: str, path: Path, resolved: Path) -> Run:
    run = Run(name, path)
    run.recipe = _object(run, path / RECIPE) or _object(run, path / LOOP)
    run.metrics = _object(run, path / METRICS)
    run.rounds = _object(run, path / ROUNDS)
    run.history = _history(run, path) or _history_of_rounds(run, path)
    run.reliability = _reliability(run, path / RELIABILITY)
    if CHECKPOINT.fullmatch(resolved.name) and not run.recipe:
        run.recipe = _object(run, path.parent / RECIPE)
    for folder in (path, path / EVALUATED, *_last_round(path)):
        if not run.evaluation:
            run.evaluation = _object(run, folder / EVALUATION)
        if not run.rows and (folder / ANNOTATIONS).is_file():
            run.rows = _tried(run, lambda file=folder / ANNOTATIONS: read_annotations(file)) or []  # type: ignore[misc]
    for folder in (path, path / SAMPLED):
        if not run.pictures and (folder / IMAGES).is_file():
            run.pictures = _tried(run, lambda file=folder / IMAGES: _pictures(run, file)) or []  # type: ignore[misc]
        if run.grid is None and (folder / GRID).is_file():
            run.grid = folder / GRID
    _judge(run)
    return run


def _file(name: str, path: Path) -> Run:
    run = Run(name, path)
    if path.suffix == ".json" and (content := _tried(run, lambda: _json(path))) is not None:
        if isinstance(content, dict):
            if "strategies" in content:
                run.reliability = _reliability(run, path)
            elif "winrate" in content:
                run.evaluation = hidden(content)
            else:
                run.faults.append(f"{path} is no file of annotations, of an evaluation or of a reward's reliability")
            return run
    if not run.faults:
        run.rows = _tried(run, lambda: read_annotations(path)) or []
    _judge(run)
    return run


def _judge(run: Run) -> None:
    """Win rates from the rows where no file holds them, and a word where the two speak of different rows."""
    if not run.rows:
        return
    judged = sum(known_preference(row["preference"]) is not None for row in run.rows)
    if run.judged:
        said = mapping(run.evaluation["winrate"]).get("n_total")
        if said != judged:
            run.faults.append(
                f"{EVALUATION} of {run.name} speaks of {said} judged rows and {ANNOTATIONS} has {judged}: one of them "
                "is older; `llmalign evaluate` brings them together"
            )
        return
    from llmalign.evaluation.alpaca import summarize

    summary = _tried(run, lambda: summarize(run.rows).as_dict())
    if summary is None:
        return
    first, second = summary["generator_1"], summary["generator_2"]
    lengths = {
        side: sum(len(row[key]) for row in run.rows) / len(run.rows)
        for side, key in (("model", "output_2"), ("reference", "output_1"))
    }
    judges = {str(row["annotator"]) for row in run.rows if row.get("annotator") is not None}
    run.evaluation = {
        "model": second, "reference": first, "winrate": summary, "interval": summary["interval"],
        "per_dataset": summary["per_dataset"], "lengths": lengths,
        "judge": {"name": ", ".join(sorted(judges))} if judges else None, **run.evaluation,
    } if not run.evaluation else {**run.evaluation, "winrate": summary, "interval": summary["interval"],
                                  "per_dataset": summary["per_dataset"], "lengths": lengths}  # fmt: skip


def _history(run: Run, path: Path) -> History:
    """The log of a run: of its end, or of the newest checkpoint that can be read."""
    checkpoints = sorted(
        (one for one in path.glob("checkpoint-*") if CHECKPOINT.fullmatch(one.name)),
        key=lambda one: -int(one.name.split("-")[1]),
    )
    for file in (path / STATE, *(one / STATE for one in checkpoints)):
        if file.is_file():
            entries = listing(_object(run, file).get("log_history"))
            found = [entry for entry in entries if isinstance(entry, dict) and number(entry.get("step")) is not None]
            if found:
                return found
    return []


def _rounds_of(path: Path) -> list[Path]:
    found = [one for one in path.glob("round-*") if ROUND.fullmatch(one.name)]
    return sorted(found, key=lambda one: int(one.name.split("-")[1]))


def _history_of_rounds(run: Run, path: Path) -> History:
    """The logs of all rounds of `llmalign iterate`, their steps counted through."""
    found: History = []
    for folder in _rounds_of(path):
        before = max((entry["step"] for entry in found), default=0)
        found += [{**entry, "step": entry["step"] + before} for entry in _history(run, folder / "train")]
    return found


def _last_round(path: Path) -> list[Path]:
    """Where `llmalign evaluate` writes for the model that the last round ended with."""
    return [one / "train" / EVALUATED for one in _rounds_of(path)[-1:]]


def _pictures(run: Run, file: Path) -> list[Pictures]:
    found = []
    for place, row in enumerate(read_rows(file)):
        names = [name for name in listing(row.get("images")) if isinstance(name, str)]
        if not names or not isinstance(row.get("prompt"), str):
            run.faults.append(f"row {place} of {file} has no prompt with images")
            continue
        inside = [file.parent / name for name in names if not Path(name).is_absolute() and ".." not in Path(name).parts]
        images = [one for one in inside if one.is_file()]
        if len(images) < len(names):
            run.faults.append(f"row {place} of {file} names {len(names) - len(images)} images that are not beside it")
        start = [one for one in (file.parent / START / image.name for image in images) if one.is_file()]
        found.append(Pictures(row["prompt"], images, start))
    return found


def _reliability(run: Run, file: Path) -> dict[str, Any]:
    content = _object(run, file)
    strategies = [one for one in listing(content.get("strategies")) if mapping(one).get("name")]
    if content and not strategies:
        run.faults.append(f"{file} has no strategies; `llmalign reliability DATA --json {file.name}` writes it")
    return {**content, "strategies": strategies} if strategies else {}


def _object(run: Run, file: Path) -> dict[str, Any]:
    """The object in a file, without secrets; empty where there is none, a fault where the file is there."""
    content = _tried(run, lambda: _json(file)) if file.is_file() else {}
    if content is None:
        return {}
    if isinstance(content, dict):
        # A log is numbers alone, and can be long.
        return content if file.name == STATE else hidden(content)
    run.faults.append(f"{file} holds no JSON object but {type(content).__name__}")
    return {}


def _json(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{file} cannot be read ({error}); is it half-written?") from error


def _tried(run: Run, read: Callable[[], Any]) -> Any:
    try:
        return read()
    except UserError as error:
        run.faults.append(str(error).rstrip("."))
        return None


def _names(paths: Sequence[Path]) -> list[str]:
    """The shortest ends of the paths that tell them apart, without the names that every run has."""
    parts = [_telling(path) for path in paths]
    names = [own[-1] for own in parts]
    for depth in (2, 3, 4):
        # A folder and a file inside of it end alike however much of the path is told: they are numbered below.
        ends = Counter(name for name, _ in {(name, tuple(own)) for name, own in zip(names, parts, strict=True)})
        names = ["/".join(own[-depth:]) if ends[name] > 1 else name for name, own in zip(names, parts, strict=True)]
    return [name if names.count(name) == 1 else f"{name} ({place + 1})" for place, name in enumerate(names)]


def _telling(path: Path) -> list[str]:
    parts = [*path.parts[1:-1], ROWS_END.sub("", path.name)]
    while len(parts) > 1 and parts[-1] in (EVALUATED, "annotations", "reliability"):
        parts.pop()
    return parts or ["run"]
