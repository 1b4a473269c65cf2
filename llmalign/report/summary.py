"""What a reader wants to know first: what was trained, whether it got better, and how sure that is."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from llmalign.errors import UserError
from llmalign.evaluation.winrate import wilson
from llmalign.report.charts import symbol
from llmalign.report.collect import Run
from llmalign.report.markup import Html, el, interval, listing, mapping, number, say, table

ACCURACIES = ("rewards/accuracies", "accuracy")
EQUAL = 0.5  # points from 50 % at equal length that are nothing
LENGTH_DECIDES = " At equal length nothing of the lead is left: length decides here."
MOST_COMPARED = 4  # runs of which all pairs are compared
METHODS = {
    "rpo": "RPO", "rdpo": "rDPO", "inpo": "INPO", "copg": "CoPG", "copg_online": "CoPG online", "fdpg": "f-DPG",
    "pf_ppo": "PF-PPO", "mdpo": "MDPO", "dpo": "DPO", "sft": "SFT", "diffusion_dpo": "Diffusion-DPO",
    "seppo": "SePPO", "d3po": "D3PO", "pso": "PSO", "pso_offline": "PSO offline", "pair": "a pairwise loss",
    "reward": "a reward model", "preference": "a preference model",
}  # fmt: skip
MARKS = {"better": "▲", "worse": "▼", "unclear": "≈", "none": "?"}


@dataclass(frozen=True)
class Verdict:
    """`kind` is better, worse, unclear or none; a headline, what it rests on, and how sure it is."""

    kind: str
    headline: str
    evidence: str = ""
    certainty: str = ""


def verdict(run: Run) -> Verdict:
    """What the best measurement of a run says: judged comparisons, else rounds, else what was held out."""
    return _by_judge(run) or _by_rounds(run) or _by_accuracy(run) or _by_reward(run) or Verdict(
        "none", "Not measured", "No win rate, and nothing held out before and after.")  # fmt: skip


def card(run: Run, place: int) -> Html:
    """A run in a few lines."""
    found = verdict(run)
    badge = el("p", el("span", MARKS[found.kind], aria_hidden="true"), f" {found.headline}", cls="headline")
    return el(
        "article",
        el("h3", symbol(place), run.name),
        el("p", what_was_trained(run), cls="trained"),
        badge,
        el("p", found.evidence) if found.evidence else None,
        _outcomes(run),
        el("p", found.certainty, cls="certainty") if found.certainty else None,
        cls=f"card {found.kind}",
    )  # fmt: skip


def what_was_trained(run: Run) -> str:
    """Method, start, steps, rows and time in one line."""
    parts = []
    if run.method:
        parts.append(METHODS.get(run.method, run.method) + (f" on {_short(run.start)}" if run.start else ""))
    rounds = [one for one in listing(run.rounds.get("rounds")) if number(mapping(one).get("round"))]
    steps = number(run.metrics.get("steps")) or max((entry["step"] for entry in run.history), default=None)
    rows = number(mapping(mapping(run.metrics.get("data")).get("train")).get("prepared_rows"))
    seconds = number(run.metrics.get("seconds"))
    for value, words in ((len(rounds) or None, "rounds"), (steps, "steps"), (rows, "rows")):
        if value:
            parts.append(f"{value:,.0f} {words}")
    if seconds is not None:
        parts.append(duration(seconds))
    if not parts:
        return f"Outputs of {run.evaluation.get('model') or run.name}"
    return ", ".join(parts)


def comparison(runs: Sequence[Run]) -> Html | None:
    """All runs in one table; None for a single one, whose card says it all."""
    if len(runs) < 2:
        return None
    rows = []
    for run in runs:
        rates = mapping(run.evaluation.get("winrate"))
        ends, lengths = mapping(run.evaluation.get("interval")), mapping(run.evaluation.get("lengths"))
        rate = [number(value) for value in (rates.get("win_rate"), ends.get("low"), ends.get("high"))]
        rows.append([
            run.name, METHODS.get(run.method or "", run.method or "–"), interval(*rate),
            say(number(rates.get("length_controlled_winrate")), 1), str(run.evaluation.get("reference") or "–"),
            say(number(rates.get("n_rows")), 0), say(number(lengths.get("model")), 0), _accuracy_cell(run),
        ])  # fmt: skip
    head = ["run", "method", "win rate, %", "at equal length, %", "against", "rows", "mean length", "pairs ordered, %"]
    filled = [place for place in range(len(head)) if place < 2 or any(row[place] != "–" for row in rows)]
    return table([head[place] for place in filled], [[row[place] for place in filled] for row in rows],
                 caption="All runs; 95 % intervals in brackets", cls="numbers")  # fmt: skip


def differences(runs: Sequence[Run]) -> Html | None:
    """Paired differences of win rates over the prompts that two runs share; of many runs each against the first."""
    from llmalign.evaluation.alpaca import compare

    judged = [run for run in runs if run.rows]
    pairs = list(itertools.combinations(judged, 2))
    if len(judged) > MOST_COMPARED:
        pairs = [pair for pair in pairs if pair[0] is judged[0]]
    lines = []
    for first, second in pairs:
        if first.evaluation.get("reference") != second.evaluation.get("reference"):
            continue
        try:
            found = compare(first.rows, second.rows)
        except UserError:  # which says that they share no prompt: there is nothing to compare
            continue
        sure = "told apart" if found.low > 0 or found.high < 0 else "not told apart"
        text = interval(found.mean, found.low, found.high)
        lines.append(el("li", el("b", f"{first.name} minus {second.name}: "), f"{text} points, {sure}",
                        el("span", f" ({found.n:,} shared prompts)", cls="faint")))  # fmt: skip
    return el("ul", lines, cls="differences") if lines else None


def duration(seconds: float) -> str:
    """Seconds as people say them."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = seconds / 60
    return f"{minutes:.0f} min" if minutes < 90 else f"{minutes / 60:.1f} h"


def held_out_accuracy(run: Run) -> tuple[float | None, float, float, float, float] | None:
    """Before (where known), after, its Wilson interval, and how many pairs were held out."""
    before, after = mapping(run.metrics.get("before")), mapping(run.metrics.get("after"))
    for ending in ACCURACIES:
        for key in after:
            prefix = key.removesuffix(ending)
            rows, value = _held_out_rows(run, prefix), number(after[key])
            if key.endswith(ending) and rows and value is not None and 0 <= value <= 1 and not prefix.endswith("/"):
                # Against itself the start orders nothing: all margins are 0, which some trainers count as wrong.
                even = number(before.get(f"{prefix}rewards/margins")) == 0
                return 0.5 if even else number(before.get(key)), value, *wilson(value, round(rows)), rows
    return None


def _held_out_rows(run: Run, prefix: str) -> float | None:
    """How many pairs a set holds: as its metrics say, else as its data was counted."""
    data = mapping(mapping(run.metrics.get("data")).get(prefix.removesuffix("_") or "evaluation"))
    return number(mapping(run.metrics.get("after")).get(f"{prefix}rows")) or number(data.get("prepared_rows"))


def _by_judge(run: Run) -> Verdict | None:
    rates, ends = mapping(run.evaluation.get("winrate")), mapping(run.evaluation.get("interval"))
    rate, low, high = number(rates.get("win_rate")), number(ends.get("low")), number(ends.get("high"))
    if rate is None:
        return None
    other = str(run.evaluation.get("reference") or "its reference")
    shown = f"{_short(other)}, its start" if run.start and _short(other) == _short(run.start) else _short(other)
    judge = mapping(run.evaluation.get("judge")).get("name")
    rows = say(number(rates.get("n_rows")), 0)
    evidence = f"Wins {_percent(rate, low, high)} of {rows} comparisons" + (f", judged by {judge}." if judge else ".")
    controlled = number(rates.get("length_controlled_winrate"))
    if controlled is not None:
        evidence += f" At equal length: {say(controlled, 1)} %."
    if low is None or high is None:
        return Verdict("unclear", f"Against {shown}", evidence, "No interval is known.")
    kind, words = _told(low, high, 50.0, f"Better than {shown}", f"Worse than {shown}", f"Not told apart from {shown}")
    sure = "The 95 % interval " + ("excludes 50 %." if kind != "unclear" else "holds 50 %: more prompts would tell.")
    if kind != "unclear" and controlled is not None and (controlled - 50) * (rate - 50) <= EQUAL * abs(rate - 50):
        # What a judge likes for its length alone is no better model.
        return Verdict("unclear", f"Told apart from {shown} by length alone", evidence, sure + LENGTH_DECIDES)
    return Verdict(kind, words, evidence, sure)


def _by_rounds(run: Run) -> Verdict | None:
    measured = [mapping(mapping(one).get("against_start")) for one in listing(run.rounds.get("rounds"))]
    known = [one for one in measured if number(one.get("mean")) is not None]
    if not known:
        return None
    mean, low, high = (number(known[-1].get(key)) for key in ("mean", "low", "high"))
    if mean is None or low is None or high is None:
        return None
    kind, headline = _told(
        low, high, 0.5, "Better than its start", "Worse than its start", "Not told apart from its start"
    )
    judge, answers = run.rounds.get("oracle"), known[-1].get("n")
    evidence = f"After the last round it wins {_percent(100 * mean, 100 * low, 100 * high)} of {answers} answers"
    sure = "The 95 % interval over prompts " + ("excludes 50 %." if kind != "unclear" else "holds 50 %.")
    return Verdict(kind, headline, f"{evidence}, judged by {judge}." if judge else f"{evidence}.", sure)


def _by_accuracy(run: Run) -> Verdict | None:
    found = held_out_accuracy(run)
    if found is None:
        return None
    before, after, low, high, rows = found
    said = f"Orders {_percent(100 * after, 100 * low, 100 * high)} of {rows:,.0f} held-out pairs as people did"
    if before is None:
        return Verdict("unclear", "Measured after training alone", f"{said}.")
    kind, words = _told(low, high, before, "Orders held-out pairs better", "Orders held-out pairs worse",
                        "Held-out pairs: no change told apart")  # fmt: skip
    sure = "excludes" if kind != "unclear" else "holds"
    certainty = f"The 95 % interval {sure} what it was before. What people would prefer to read was not judged."
    return Verdict(kind, words, f"{said}; before {say(100 * before, 1)} %.", certainty)


def _by_reward(run: Run) -> Verdict | None:
    before, after = mapping(run.metrics.get("before")), mapping(run.metrics.get("after"))
    for key in after:
        if key == "reward" or key.endswith("_reward"):
            values = number(before.get(key)), number(after[key])
            if values[0] is not None and values[1] is not None:
                words = "Reward went up" if values[1] > values[0] else "Reward went down"
                if values[0] == values[1]:
                    words = "Reward did not move"
                said = f"Held-out reward {say(values[0])} before, {say(values[1])} after."
                return Verdict("unclear", words, said, "No interval was measured, and no judge was asked.")
    return None


def _percent(mean: float, low: float | None, high: float | None) -> str:
    ends = "" if low is None or high is None else f" [{say(low, 1)}, {say(high, 1)}]"
    return f"{say(mean, 1)} %{ends}"


def _told(low: float, high: float, level: float, better: str, worse: str, neither: str) -> tuple[str, str]:
    if low > level:
        return "better", better
    return ("worse", worse) if high < level else ("unclear", neither)


def _outcomes(run: Run) -> Html | None:
    """Wins, ties and losses as one bar."""
    rates = mapping(run.evaluation.get("winrate"))
    keys = {"won": "n_wins", "tied": "n_draws", "lost": "n_wins_base"}
    known = {name: number(rates.get(key)) or 0.0 for name, key in keys.items()}
    total = sum(known.values())
    if not total:
        return None
    parts, x = [], 0.0
    for name, value in known.items():
        width = 100 * value / total
        parts.append(el("rect", x=round(x, 2), y=0, width=round(width, 2), height=6, cls=name))
        x += width
    bar = el("svg", parts, viewBox="0 0 100 6", preserveAspectRatio="none", aria_hidden="true", cls="outcomes")
    words = ", ".join(f"{value:,.0f} {name}" for name, value in known.items())
    return el("div", bar, el("p", words, cls="counts"))


def _accuracy_cell(run: Run) -> str:
    found = mapping(run.evaluation.get("accuracy"))
    values = [number(found.get(key)) for key in ("mean", "low", "high")]
    if values[0] is not None:
        return interval(*values, scale=100)
    held = held_out_accuracy(run)
    return "–" if held is None else interval(held[1], held[2], held[3], scale=100)


def _short(name: str | None) -> str:
    """A path's last name; a Hub name stays whole."""
    text = str(name)
    return text.rstrip("/").rsplit("/", 1)[-1] if text.startswith(("/", "./", "../", "~")) else text
