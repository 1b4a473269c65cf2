"""A reward's reliability as a table, and as a picture: groups of rewards against their scores, a panel a strategy."""

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich.table import Table

from llmalign.rewards.reliability import Reliability, Strategy

COLOUR, CHOSEN, INK = "#0072b2", "#d55e00", "#222222"


def plot_reliability(result: Reliability, path: Path | str) -> Path:
    """Draw a PNG and return its path: a dot a group (its area: the share of weight in it), and the weighted fit."""
    columns = min(3, len(result.strategies))
    rows = -(-len(result.strategies) // columns)
    figure = Figure(figsize=(4.2 * columns, 3.4 * rows + 0.6), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    axes = list(figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True).flat)
    for axis, strategy in zip(axes, result.strategies, strict=False):
        _draw(axis, strategy, CHOSEN if strategy.name == result.recommended else COLOUR)
    for axis in axes[len(result.strategies) :]:
        axis.set_visible(False)
    figure.suptitle(
        f"{result.prompts} prompts, {result.responses} responses, {result.n_groups} groups of equal width; "
        f"recommended: {result.recommended}",
        fontsize=11, color=INK,
    )  # fmt: skip
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130, format="png")
    return path


def table(result: Reliability) -> Table:
    """One line a strategy, intervals of 95 % in brackets."""
    title = f"{result.prompts} prompts, {result.responses} responses, {result.n_groups} groups of equal width"
    found = Table(title=title)
    for name in ("strategy", "R^2", "less that of none", "R^2 of groups", "rank correlation", "slope", "prompts"):
        found.add_column(name, justify="left" if name == "strategy" else "right")
    for one in result.strategies:
        cells = (one.name, str(one.r2), str(one.gain), str(one.grouped_r2), str(one.spearman))
        found.add_row(*cells, f"{one.slope:.3g}", str(one.prompts))
    return found


def _draw(axis: Axes, strategy: Strategy, colour: str) -> None:
    sizes = [12 + 400 * share for share in strategy.group_weights]
    axis.scatter(strategy.group_rewards, strategy.group_scores, s=sizes, color=colour, alpha=0.6, linewidths=0)
    ends = [min(strategy.group_rewards, default=0.0), max(strategy.group_rewards, default=0.0)]
    axis.plot(ends, [strategy.intercept + strategy.slope * end for end in ends], color=INK, lw=1)
    axis.set_title(
        f"{strategy.name}: $R^2$ {strategy.r2.value:.2f}, grouped {strategy.grouped_r2.value:.2f}",
        loc="left", fontsize=10, color=INK,
    )  # fmt: skip
    axis.set_xlabel("mean reward of the group", fontsize=9, color=INK)
    axis.set_ylabel("mean true score", fontsize=9, color=INK)
    axis.tick_params(labelsize=8, colors=INK, labelbottom=True, labelleft=True)
    axis.grid(alpha=0.25, lw=0.6)
    axis.spines[["top", "right"]].set_visible(False)
