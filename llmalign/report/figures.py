"""The charts of what was measured: win rates, lengths, rounds, and how far a reward can be trusted."""

from collections.abc import Sequence
from functools import partial
from typing import Any

from llmalign.evaluation.annotations import known_preference
from llmalign.evaluation.winrate import bootstrap_mean
from llmalign.report.charts import Group, Mark, interval_chart, scatter_chart
from llmalign.report.collect import Run
from llmalign.report.markup import Html, listing, mapping, number

Z = 1.96
RATIOS = (("less than half", 0.0, 0.5), ("half to 0.8 ×", 0.5, 0.8), ("0.8 to 1.25 ×", 0.8, 1.25),
          ("1.25 to 2 ×", 1.25, 2.0), ("more than twice", 2.0, float("inf")))  # fmt: skip
FEWEST = 5  # rows that a share is shown for
RESAMPLES = 1000
SHARES = (("against_start", "Wins over the start"), ("against_previous", "Wins over the round before"))
MEASURES = (
    ("reward", "Reward", "as the oracle gives it", None),
    ("length", "Length", "tokens", None),
    ("kl", "KL to the reference", "nats a completion", 0.0),
    ("duality_gap", "Duality gap", "0 at equilibrium", 0.0),
)


def win_rates(runs: Sequence[Run]) -> Html | None:
    """Raw and length-controlled win rates with 95 % intervals, a line a run."""
    groups = []
    for place, run in enumerate(runs):
        if not run.judged:
            continue
        rates, ends = mapping(run.evaluation["winrate"]), mapping(run.evaluation.get("interval"))
        value = number(rates.get("win_rate"))
        error = number(rates.get("standard_error"))
        low, high = number(ends.get("low")), number(ends.get("high"))
        if value is None:
            continue
        if low is None and error is not None:
            low, high = _ends(value, error)
        against = f"against {run.evaluation.get('reference') or 'its reference'}"
        group = Group(run.name, [Mark(run.name, place, value, low, high, note=f"raw, {against}")])
        groups.append(group)
        controlled, spread = number(rates.get("length_controlled_winrate")), number(rates.get("lc_standard_error"))
        if controlled is not None:
            low, high = _ends(controlled, spread)
            note = f"length-controlled, {against}"
            group.marks.append(Mark(run.name, place, controlled, low, high, note=note, hollow=True))
    if not groups:
        return None
    return interval_chart(
        "Win rate", "percent, with 95 % intervals", groups, level=50.0,
        note="Filled: as judged, with its numbers. Hollow: at equal lengths. Right of 50 the model is preferred.",
    )  # fmt: skip


def by_dataset(runs: Sequence[Run]) -> Html | None:
    """Win rates of each part of the prompts; None where the rows name no data set."""
    found: dict[str, list[Mark]] = {}
    for place, run in enumerate(runs):
        for row in listing(run.evaluation.get("per_dataset")):
            value, error = number(mapping(row).get("win_rate")), number(mapping(row).get("standard_error"))
            if value is None:
                continue
            low, high = _ends(value, error)
            mark = Mark(run.name, place, value, low, high, note=f"{row.get('n')} rows")
            found.setdefault(str(row.get("dataset")), []).append(mark)
    if len(found) < 2:
        return None
    groups = [Group(name, marks) for name, marks in found.items()]
    return interval_chart("Win rate by data set", "percent, with 95 % intervals", groups, level=50.0)


def lengths(runs: Sequence[Run]) -> Html | None:
    """Mean length of the outputs against the win rate, with the references to compare with."""
    marks, references = [], {}
    for place, run in enumerate(runs):
        sides = mapping(run.evaluation.get("lengths"))
        own, their = number(sides.get("model")), number(sides.get("reference"))
        rate = number(mapping(run.evaluation.get("winrate")).get("win_rate"))
        ends = mapping(run.evaluation.get("interval"))
        if own is None or rate is None:
            continue
        marks.append(Mark(run.name, place, rate, number(ends.get("low")), number(ends.get("high")), own))
        if their is not None:
            references[str(run.evaluation.get("reference") or "reference"), round(their)] = their
    if not marks:
        return None
    for (name, _), their in references.items():
        marks.append(Mark(f"{name}, the reference", None, 50.0, x=their))
    return scatter_chart(
        "Length against win rate", "win rate, percent", "mean length of the outputs, characters", marks, level=50.0,
        note="The grey diamond is the reference, which ties with itself.",
    )  # fmt: skip


def by_length(runs: Sequence[Run]) -> Html | None:
    """Win rates where the output is shorter, as long as, or longer than the reference's."""
    groups = [Group(name) for name, _, _ in RATIOS]
    for place, run in enumerate(runs):
        for group, (_, least, most) in zip(groups, RATIOS, strict=True):
            rows = [
                (p - 1, str(row["instruction"])) for row in run.rows
                if (p := known_preference(row["preference"])) is not None
                and least <= len(row["output_2"]) / max(len(row["output_1"]), 1) < most
            ]  # fmt: skip
            if len(rows) >= FEWEST:
                found = bootstrap_mean([p for p, _ in rows], [name for _, name in rows], resamples=RESAMPLES)
                # Rows that all say the same have no spread to draw, which is not to be sure.
                low, high = (None, None) if found.low == found.high else (100 * found.low, 100 * found.high)
                group.marks.append(Mark(run.name, place, 100 * found.mean, low, high, note=f"{len(rows)} rows"))
    groups = [group for group in groups if group.marks]
    if not groups:
        return None
    return interval_chart(
        "Win rate by relative length", "percent, with 95 % intervals", groups, level=50.0,
        note=f"The output's length over the reference's. Fewer than {FEWEST} rows are not shown.",
    )  # fmt: skip


def rounds(runs: Sequence[Run]) -> list[Html]:
    """What was measured at the end of each round, a chart a measurement."""
    charts = []
    for key, title, unit, level in (
        *((key, title, "percent of comparisons", 50.0) for key, title in SHARES), *MEASURES
    ):  # fmt: skip
        scale = 100.0 if level == 50.0 else 1.0
        marks = [mark for place, run in enumerate(runs) for mark in _of_rounds(run, place, key, scale)]
        if marks:
            charts.append(
                scatter_chart(title, unit, "round", marks, level=level, digits=1 if scale > 1 else 2, rounds=True)
            )
    return charts


def _ends(value: float, error: float | None) -> tuple[float | None, float | None]:
    """A rate's interval from its standard error; none where all rows said the same, which is not to be sure."""
    return (max(value - Z * error, 0.0), min(value + Z * error, 100.0)) if error else (None, None)


def _of_rounds(run: Run, place: int, key: str, scale: float) -> list[Mark]:
    marks = []
    for one in listing(run.rounds.get("rounds")):
        found = mapping(mapping(one).get(key))
        mean, low, high = (number(found.get(name)) for name in ("mean", "low", "high"))
        at = number(mapping(one).get("round"))
        if mean is not None and at is not None:
            low, high = (None if end is None else scale * end for end in (low, high))
            note = f"round {at:.0f}, n = {found.get('n')}"
            marks.append(Mark(run.name, place, scale * mean, low, high, x=at, note=note))
    return marks


def reliability(run: Run, place: int) -> list[Html]:
    """R² of the true score on the reward under every filter, and the groups behind it."""
    groups, charts = [], []
    for one in run.reliability.get("strategies", []):
        found = mapping(one.get("r2"))
        value = number(found.get("value"))
        chosen = one["name"] == run.reliability.get("recommended")
        name = f"{one['name']} (recommended)" if chosen else str(one["name"])
        mark = partial(Mark, name, place, hollow=not chosen)
        if value is not None:
            ends = number(found.get("low")), number(found.get("high"))
            groups.append(Group(name, [mark(value, *ends, note=f"{one.get('prompts')} prompts")]))
        points = _groups_of(one)
        if points:
            marks = [
                mark(score, x=reward, note=f"{100 * share:.1f} % of the weight") for reward, score, share in points
            ]
            ends = number(one.get("slope")), number(one.get("intercept"))
            charts.append(scatter_chart(
                name, "mean true score of a group", "mean reward of the group", marks, digits=2,
                line=None if None in ends else ends, sizes=[share for _, _, share in points],
            ))  # fmt: skip
    if groups:
        charts.insert(
            0, interval_chart("How well the reward predicts the score", "R², with 95 % intervals", groups, digits=2)
        )
    return charts


def _groups_of(strategy: dict[str, Any]) -> list[tuple[float, float, float]]:
    columns = [listing(strategy.get(f"group_{name}")) for name in ("rewards", "scores", "weights")]
    rows = [tuple(number(value) for value in row) for row in zip(*columns, strict=False)]
    return [row for row in rows if None not in row and row[2] >= 0]  # type: ignore[misc, operator]
