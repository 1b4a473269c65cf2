"""What the rounds of a run came to, as a table and as a picture."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from rich.table import Table

from llmalign.evaluation.plots import COLOURS, FAINT, label_axis

SHARES = {"against_start": "wins over the start", "against_previous": "wins over the round before"}
OTHERS = {
    "reward": ("reward", "reward", "{:.3g}"),
    "length": ("length", "tokens", "{:.1f}"),
    "kl": ("KL to the reference", "nats a completion", "{:.2f}"),
    "duality_gap": ("duality gap", "2 max P - 1; 0 at equilibrium", "{:.3f}"),
}


def rounds_table(result: Mapping[str, Any]) -> Table:
    """Every round with what was measured at its end, each with its 95 % interval."""
    rounds = result["rounds"]
    table = Table(title=f"{result['method']} on {result['model']}, judged by {result['oracle']}")
    table.add_column("round", justify="right")
    table.add_column("trained on", justify="right")
    shown = [name for name in SHARES if any(name in one for one in rounds)]
    more = [name for name in OTHERS if any(name in one for one in rounds)]
    for name in (*(SHARES[name] for name in shown), *(OTHERS[name][0] for name in more)):
        table.add_column(name, justify="right")
    for one in rounds:
        trained = one["counts"].get("pair", {})
        rows = next((f"{trained[kind]:,} {kind}" for kind in ("pairs", "groups") if kind in trained), "")
        cells = [_cell(one.get(name), "{:.3f}") for name in shown]
        table.add_row(str(one["round"]), rows, *cells, *(_cell(one.get(name), OTHERS[name][2]) for name in more))
    table.caption = f"{result['final_model']}: the model. Intervals are over prompts, 95 %."
    return table


def plot_rounds(result: Mapping[str, Any], path: Path) -> None:
    """One panel for the win rates and one for each other measurement, by round, into a PNG; nothing without any."""
    rounds = result["rounds"]
    shares = [name for name in SHARES if any(name in one for one in rounds)]
    others = [name for name in OTHERS if any(name in one for one in rounds)]
    if not shares and not others:
        return
    count = bool(shares) + len(others)
    columns = min(2, count)
    figure = Figure(figsize=(5.2 * columns, 3.3 * -(-count // columns)), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    axes = list(figure.subplots(-(-count // columns), columns, squeeze=False).flat)
    if shares:
        axes[0].axhline(0.5, color=FAINT, lw=0.8, ls=":", zorder=0)
        for place, name in enumerate(shares):
            _draw(axes[0], rounds, name, COLOURS[place], SHARES[name])
        _label(axes[0], "Win rate", "share of comparisons")
        axes[0].legend(frameon=False, fontsize=9)
    for axis, name in zip(axes[bool(shares) :], others, strict=False):
        _draw(axis, rounds, name, COLOURS[0], OTHERS[name][0])
        _label(axis, OTHERS[name][0][0].upper() + OTHERS[name][0][1:], OTHERS[name][1])
    for axis in axes[count:]:
        axis.set_visible(False)
    aside = path.with_suffix(".tmp.png")
    figure.savefig(aside, dpi=130)
    aside.replace(path)


def _cell(measured: Mapping[str, Any] | None, form: str) -> str:
    if measured is None:
        return ""
    if measured["mean"] is None:
        return "nothing judged"
    mean, low, high = (form.format(measured[key]) for key in ("mean", "low", "high"))
    return f"{mean} [{low}, {high}]"


def _draw(axis: Axes, rounds: list[dict[str, Any]], name: str, colour: str, label: str) -> None:
    known = [(one["round"], one[name]) for one in rounds if name in one and one[name]["mean"] is not None]
    places = [number for number, _ in known]
    means = [measured["mean"] for _, measured in known]
    # Rounding can put the end of an interval a hair on the wrong side of a mean of 0 or 1.
    spread = [[max(m["mean"] - m["low"], 0.0) for _, m in known], [max(m["high"] - m["mean"], 0.0) for _, m in known]]
    axis.errorbar(places, means, yerr=spread, color=colour, lw=1.8, marker="o", ms=4, capsize=3, label=label)


def _label(axis: Axes, title: str, unit: str) -> None:
    label_axis(axis, title, unit, "round")
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
