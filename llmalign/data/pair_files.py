"""A file of preference pairs out of a file of scored answers or of judged comparisons, and what became of every row."""

import gzip
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from datasets import Dataset

from llmalign.data.checks import Content
from llmalign.data.formats import load
from llmalign.data.pairing import (
    BEST_WORST,
    NEUTRAL,
    REASONS,
    Selection,
    check_options,
    row_rng,
    select_comparison,
    select_pairs,
)
from llmalign.data.readers import open_shards
from llmalign.data.rows import KINDS
from llmalign.data.specs import DataSource, check_keys
from llmalign.errors import UserError

GROUPS, COMPARISONS, IMAGES = FORMS = ("groups", "comparisons", "images")
LOADED_AS = {GROUPS: "scored_groups", COMPARISONS: "comparisons"}
IMAGE_COLUMNS = ("prompt", "caption", "text", "images", "rewards")
TOLD_BY = {
    GROUPS: ("completions", "rewards"),
    COMPARISONS: ("output_1", "output_2", "preference"),
    IMAGES: ("images",),
}
SUFFIXES = (".jsonl", ".jsonl.gz")
NEARLY = ("below_margin", "ties", "identical", "unjudged")
WAYS_OUT = {
    "below_margin": "lower --margin",
    "ties": "use a reward or a judge that tells the answers apart",
    "identical": "sample more varied answers",
    "unjudged": "judge the answers first",
    "unscored": "score the answers first",
    "empty": "sample answers that say something",
    "alone": "give every prompt two or more scored answers",
}


@dataclass(frozen=True)
class PairOptions:
    """How pairs are chosen, as in `select_pairs`; the strategy of judged comparisons is None, since they have none."""

    strategy: str | None = None
    margin: float = 0.0
    max_pairs: int | None = None
    seed: int = 0


@dataclass
class PairReport:
    """What was read and written. `longer`: text pairs whose chosen answer has more characters; `margins`: their sum."""

    form: str
    rows: int = 0
    rows_with_pairs: int = 0
    pairs: int = 0
    margins: float = 0.0
    longer: int = 0
    dropped: Counter[str] = field(default_factory=Counter)


def write_pairs(
    source: DataSource,
    out: Path,
    *,
    form: str | None = None,
    options: PairOptions | None = None,
    overwrite: bool = False,
) -> PairReport:
    """Write the pairs of `source` as JSON lines to `out` (.jsonl or .jsonl.gz), aside first and then renamed.

    form: `groups` (prompt, completions, rewards) or `comparisons` (instruction, output_1, output_2, preference, as in
    AlpacaEval's annotations); None tells by the columns. A row of the result has prompt, chosen, rejected, margin, the
    source's row_id, and chosen_reward and rejected_reward, or the judge's preference as it was. Answers without words
    are left out, since training refuses them. Raises UserError for whatever cannot be read, followed or written, and
    where no row gives a pair. Not covered: rows that are repeated in the source; their pairs are, too; images, which
    `image_pairs.write_image_pairs` makes pairs of.
    """
    options = options or PairOptions()
    check_out(source, out, overwrite, SUFFIXES)
    form = form or form_of(source)
    if form == IMAGES:
        raise UserError(f"{source.path} has images; `write_image_pairs` makes pairs of them.")
    _check(form, options)
    rows = load(source, kind=LOADED_AS[form])
    report = PairReport(form)
    selections = []
    for row in rows:
        selection = _select(form, row, options)
        selections.append(selection.pairs)
        _count(report, row, selection)
    if not report.pairs:
        raise no_pair(source, report)
    _write(out, _records(form, rows, selections))
    return report


def form_of(source: DataSource) -> str:
    """The one of FORMS that the columns of the first row tell. Raises UserError where it is none or several."""
    columns = source.columns or {}
    check_keys(columns, [*(name for kind in LOADED_AS.values() for name in KINDS[kind]), *IMAGE_COLUMNS], "`columns`")
    shard = open_shards(source, streaming=False)[0]
    number, first = next(shard.rows())
    known = {*(name for name in first if name not in columns), *(name for name in columns if columns[name] is not None)}
    forms = [form for form in FORMS if known.issuperset(TOLD_BY[form])]
    if len(forms) == 1:
        return forms[0]
    place = f"{shard.name}, {shard.unit} {number}"
    if forms:
        raise UserError(f"{place} has the columns of {' and of '.join(forms)}; say which with --kind.")
    if known.issuperset(("chosen", "rejected")):
        raise UserError(f"{place} is a preference pair already, with 'chosen' and 'rejected': train on it as it is.")
    raise UserError(
        f"{place} has neither 'completions' and 'rewards' nor 'output_1', 'output_2' and 'preference' nor 'images'; it "
        f"has: {', '.join(first)}; say with --columns what stands for them."
    )


def _check(form: str, options: PairOptions) -> None:
    if form == GROUPS:
        check_options(options.strategy or BEST_WORST, options.margin, options.max_pairs)
        return
    if options.strategy is not None or options.max_pairs is not None:
        raise UserError("A judged comparison is one pair: --strategy and --max_pairs_per_prompt are for groups.")
    select_comparison(None, ("", ""), margin=options.margin)


def _select(form: str, row: dict[str, Any], options: PairOptions) -> Selection:
    answers = _answers(form, row)
    empty = [not _text(answer).strip() for answer in answers]
    if form == COMPARISONS:
        if any(empty):
            return Selection((), Counter({"empty": sum(empty)}))
        return select_comparison(row["preference"], answers, margin=options.margin)
    kept = [place for place, is_empty in enumerate(empty) if not is_empty]
    found = select_pairs(
        [row["rewards"][place] for place in kept],
        [answers[place] for place in kept],
        strategy=options.strategy or BEST_WORST,
        rng=row_rng(options.seed, row["row_id"]),
        margin=options.margin,
        max_pairs=options.max_pairs,
    )
    pairs = tuple((kept[chosen], kept[rejected]) for chosen, rejected in found.pairs)
    return Selection(pairs, +(found.dropped + Counter({"empty": sum(empty)})))


def _answers(form: str, row: dict[str, Any]) -> list[Content]:
    return row["completions"] if form == GROUPS else [row["output_1"], row["output_2"]]


def _text(content: Content) -> str:
    return content if isinstance(content, str) else content[-1]["content"]


def _margin(form: str, row: dict[str, Any], chosen: int, rejected: int) -> float:
    if form == COMPARISONS:
        return 2 * abs(row["preference"] - NEUTRAL)
    return row["rewards"][chosen] - row["rewards"][rejected]


def _count(report: PairReport, row: dict[str, Any], selection: Selection) -> None:
    answers = _answers(report.form, row)
    report.rows += 1
    report.rows_with_pairs += bool(selection.pairs)
    report.dropped += selection.dropped
    for chosen, rejected in selection.pairs:
        report.pairs += 1
        report.margins += _margin(report.form, row, chosen, rejected)
        report.longer += _length(answers[chosen]) > _length(answers[rejected])


def _records(form: str, rows: Dataset, selections: list[tuple[tuple[int, int], ...]]) -> Iterator[dict[str, Any]]:
    for row, pairs in zip(rows, selections, strict=True):
        answers = _answers(form, row)
        for chosen, rejected in pairs:
            if form == GROUPS:
                told_by = {"chosen_reward": row["rewards"][chosen], "rejected_reward": row["rewards"][rejected]}
            else:
                told_by = {"preference": row["preference"]}
            yield {
                "prompt": row["prompt" if form == GROUPS else "instruction"],
                "chosen": answers[chosen],
                "rejected": answers[rejected],
                **told_by,
                "margin": _margin(form, row, chosen, rejected),
                "row_id": row["row_id"],
            }


def _length(content: Content) -> int:
    return len(content) if isinstance(content, str) else sum(len(message["content"]) for message in content)


def no_pair(source: DataSource, report: PairReport, ways_out: Mapping[str, str] = WAYS_OUT) -> UserError:
    """What to say where no row gave a pair: every reason with its count, and the way out of the nearest to a pair."""
    counts = report.dropped.most_common()
    listed = "; ".join(f"{worded(REASONS[reason], report.form)}: {count:,}" for reason, count in counts)
    # A row that came as far as a pair needs less to give one than a row without two answers.
    nearest = next((reason for reason, _ in counts if reason in NEARLY), counts[0][0])
    way_out = worded(ways_out[nearest], report.form)
    return UserError(f"{source.path} gives no pair (rows: {report.rows:,}; {listed}): {way_out}.")


def worded(text: str, form: str) -> str:
    """What is said of answers, said of what rows of this form hold."""
    return text.replace("answer", "image") if form == IMAGES else text


def check_out(source: DataSource, out: Path, overwrite: bool, suffixes: tuple[str, ...]) -> None:
    """Raise UserError where `out` cannot be written without harm, or does not end as it should."""
    if not out.name.endswith(suffixes):
        raise UserError(f"--out must end in {' or '.join(suffixes)} for these pairs, got {out}.")
    if out.is_dir():
        raise UserError(f"--out {out} is a folder; name a file in it.")
    if out.exists() and Path(source.path).exists() and out.samefile(source.path):
        raise UserError(f"--out {out} is the file that is read; write the pairs beside it.")
    if out.exists() and not overwrite:
        raise UserError(f"{out} is there already; give --overwrite to replace it, or another --out.")


def _write(out: Path, records: Iterable[dict[str, Any]]) -> None:
    with written_aside(out) as aside, _opened(aside, packed=out.suffix == ".gz") as handle:
        for record in records:
            handle.write(json.dumps(record, ensure_ascii=False).encode() + b"\n")


@contextmanager
def written_aside(out: Path) -> Iterator[Path]:
    """A file to write to, which takes the place of `out` once the block has ended well, and else is gone.

    Raises UserError where writing fails.
    """
    aside = out.with_name(f".{out.name}.{os.getpid()}.part")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield aside
            os.replace(aside, out)
        finally:
            aside.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"{out} cannot be written: {error.strerror or error}.") from error


@contextmanager
def _opened(file: Path, packed: bool) -> Iterator[Any]:
    with open(file, "wb") as handle:
        if not packed:
            yield handle
            return
        # Without a name and a time, so that the same pairs are the same bytes.
        with gzip.GzipFile("", "wb", fileobj=handle, mtime=0) as archive:
            yield archive
