"""From what the processes measured to ratios, the table and the JSON."""

import math
import statistics
from dataclasses import asdict, dataclass
from typing import Any

from rich.table import Table

from benching.cases import Case, batches
from benching.limit import fed_tokens, step_flops

#: how far losses may lie apart, relatively: summation order in float32, rounding of every number in bfloat16
LOSS_TOLERANCE = {"float32": 1e-3, "bfloat16": 5e-2}

Measured = dict[str, Any]


@dataclass(frozen=True)
class Summary:
    """A case's outcome. `time_ratio` is TRL's over ours, `memory_ratio` ours over TRL's.

    `low`, `high`: the time ratio of single rounds. `precomputed_*`: against TRL with precomputed log-probs.
    `fraction_of_limit`: least operations of a step over what `torch.mm` would do in its time. `tokens_per_second`: of
    ours, every prompt counted once. `layout`: what ours scored in, where nothing made it fall back `shared_prompt`.
    """

    case: str
    time_ratio: float
    low: float
    high: float
    memory_ratio: float
    fraction_of_limit: float
    seconds: float
    trl_seconds: float
    megabytes: float
    trl_megabytes: float
    tokens_per_second: float
    mm_rate: float
    layout: str
    precomputed_time_ratio: float | None = None
    precomputed_memory_ratio: float | None = None


def typical(case: Case, rounds: list[list[float]]) -> float:
    """Seconds a step: the median; where batches differ in length, the mean over batches of each one's median."""
    if case.lognormal:
        return statistics.fmean(statistics.median(same_batch) for same_batch in zip(*rounds, strict=True))
    return statistics.median(seconds for one in rounds for seconds in one)


def check_alike(case: Case, measured: list[Measured]) -> None:
    """Raise RuntimeError where two contenders' losses lie apart: they would not have done the same work."""
    first = measured[0]
    for other in measured[1:]:
        pairs = zip(first["losses"], other["losses"], strict=True)
        if not all(math.isclose(one, two, rel_tol=LOSS_TOLERANCE[first["dtype"]]) for one, two in pairs):
            raise RuntimeError(
                f"{case.name}: {first['contender']} and {other['contender']} do not train alike: losses "
                f"{first['losses']} and {other['losses']}"
            )


def summarise(case: Case, measured: list[Measured], *, quick: bool = False) -> Summary:
    """Reduce what all processes of a case measured, in the order of their rounds."""
    if case.method is None:  # else each contender trains on what it sampled
        check_alike(case, measured)
    rounds = {name: [one["seconds"] for one in measured if one["contender"] == name] for name in case.contenders}
    seconds = {name: typical(case, own) for name, own in rounds.items()}
    megabytes = {
        name: statistics.median(one["megabytes"] for one in measured if one["contender"] == name)
        for name in case.contenders
    }
    single = [
        typical(case, [theirs]) / typical(case, [own])
        for own, theirs in zip(rounds["ours"], rounds["trl"], strict=True)
    ]
    counted = batches(case, 1 + len(rounds["ours"][0]), quick=quick)[1:]
    mm_rate = max(one["mm_rate"] for one in measured)
    flops = statistics.fmean(step_flops(case, batch) for batch in counted)
    summary = Summary(
        case=case.name,
        time_ratio=seconds["trl"] / seconds["ours"],
        low=min(single),
        high=max(single),
        memory_ratio=megabytes["ours"] / megabytes["trl"],
        fraction_of_limit=flops / mm_rate / seconds["ours"],
        seconds=seconds["ours"],
        trl_seconds=seconds["trl"],
        megabytes=megabytes["ours"],
        trl_megabytes=megabytes["trl"],
        tokens_per_second=statistics.fmean(sum(map(fed_tokens, batch)) for batch in counted) / seconds["ours"],
        mm_rate=mm_rate,
        layout=", ".join(sorted({one["layout"] for one in measured if one["contender"] == "ours"})),
    )
    if not case.cached:
        return summary
    return Summary(
        **asdict(summary)
        | {
            "precomputed_time_ratio": seconds["trl-precomputed"] / seconds["ours"],
            "precomputed_memory_ratio": megabytes["ours"] / megabytes["trl-precomputed"],
        }
    )


def entry(summary: Summary) -> dict[str, str | float]:
    """What `--json` writes of a case."""
    return {key: getattr(summary, key) for key in ("case", "time_ratio", "memory_ratio", "fraction_of_limit")}


def target(met: bool, words: str) -> str:
    """The number aimed at, and whether it is reached."""
    return f"[green]{words} met[/green]" if met else f"[red]{words} not met[/red]"


def both(ours: float, theirs: float, digits: int) -> str:
    """Two absolute numbers in one cell."""
    return f"{ours:.{digits}f} / {theirs:.{digits}f}"


def table(summaries: list[Summary], cases: dict[str, Case], title: str, *, targets: bool) -> Table:
    """The table that the terminal shows; `targets` says whether those of the cases apply."""
    result = Table(title=title, caption="time: TRL's over ours (and of single rounds); memory: ours over TRL's")
    columns = [
        "case",
        "time",
        "rounds",
        "target",
        "memory",
        "target",
        "seconds",
        "MB",
        "of the limit",
        "tokens/s",
        "layout",
    ]
    kept = [index for index, name in enumerate(columns) if targets or name != "target"]
    for index in kept:
        result.add_column(columns[index], justify="right" if index else "left")
    for one in summaries:
        case = cases[one.case]
        cells = [
            one.case,
            f"{one.time_ratio:.2f}",
            f"{one.low:.2f}-{one.high:.2f}",
            target(one.time_ratio >= case.time_target, f">= {case.time_target:.1f}"),
            f"{one.memory_ratio:.2f}",
            target(one.memory_ratio <= case.memory_target, f"<= {case.memory_target:.2f}"),
            both(one.seconds, one.trl_seconds, 3),
            both(one.megabytes, one.trl_megabytes, 0),
            f"{one.fraction_of_limit:.0%}",
            f"{one.tokens_per_second:.0f}",
            one.layout,
        ]
        result.add_row(*(cells[index] for index in kept))
        if one.precomputed_time_ratio is not None and one.precomputed_memory_ratio is not None:
            beside = ["  TRL precomputed", f"{one.precomputed_time_ratio:.2f}", "", ""]
            beside += [f"{one.precomputed_memory_ratio:.2f}", "", "", "", "", "", ""]
            result.add_row(*(beside[index] for index in kept))
    return result
