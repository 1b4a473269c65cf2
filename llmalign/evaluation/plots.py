"""Training curves as a picture, from the log histories of trainers."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from llmalign.evaluation.panels import PANELS, Panel

History = Sequence[Mapping[str, float]]

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")  # told apart by colour-blind readers too
INK, FAINT = "#222222", "#8a8a8a"


AVERAGE = "_average"


def plot_training(
    histories: Mapping[str, History], path: Path | str, *, title: str = "", panels: Sequence[Panel] = PANELS
) -> Path:
    """Draw one panel a metric, the runs overlaid, into a PNG, and return its path.

    `histories` maps a run's name to its `trainer.state.log_history`. Training values are a faint line, held-out values
    (the metric with `eval_` before it) a strong one with dots, and where a moving average was logged (the metric with
    `_average` behind it) it is a broken one. A metric that no run logged keeps an empty panel that says so.
    Not covered: several named evaluation sets. Raises ValueError without runs.
    """
    if not histories:
        raise ValueError("there is no run to draw")
    columns = min(2, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(5.2 * columns, 3.3 * rows + 0.7), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    colours = {name: COLOURS[place % len(COLOURS)] for place, name in enumerate(histories)}
    for axis, panel in zip(axes, panels, strict=False):
        _draw(axis, panel, histories, colours)
    for axis in axes[len(panels) :]:
        axis.set_visible(False)
    handles = [Line2D([], [], color=colour, lw=2, label=name) for name, colour in colours.items()]
    handles.append(Line2D([], [], color=FAINT, lw=1.8, marker="o", ms=4, label="held out"))
    handles.append(Line2D([], [], color=FAINT, lw=1, alpha=0.6, label="training"))
    metrics = [panel.metric + AVERAGE for panel in panels]
    if any(metric in entry for history in histories.values() for entry in history for metric in metrics):
        handles.append(Line2D([], [], color=FAINT, lw=1.4, ls="--", label="its moving average"))
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False, fontsize=10)
    if title:
        figure.suptitle(title, fontsize=13, color=INK)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    return path


def series(history: History, metric: str) -> tuple[list[float], list[float]]:
    """The steps at which a metric was logged, and its values."""
    points = [(entry["step"], entry[metric]) for entry in history if metric in entry]
    return [step for step, _ in points], [value for _, value in points]


def _draw(axis: Axes, panel: Panel, histories: Mapping[str, History], colours: Mapping[str, str]) -> None:
    drawn = False
    for name, history in histories.items():
        steps, values = series(history, panel.metric)
        axis.plot(steps, values, color=colours[name], lw=1, alpha=0.4)
        axis.plot(*series(history, panel.metric + AVERAGE), color=colours[name], lw=1.4, ls="--")
        held_steps, held_values = series(history, f"eval_{panel.metric}")
        axis.plot(held_steps, held_values, color=colours[name], lw=1.8, marker="o", ms=4)
        drawn = drawn or bool(values or held_values)
    if not drawn:
        axis.text(0.5, 0.5, f"{panel.metric} was not logged", transform=axis.transAxes, ha="center", color=FAINT)
    if panel.level is not None:
        axis.axhline(panel.level, color=FAINT, lw=0.8, ls=":", zorder=0)
    label_axis(axis, panel.title, panel.unit, "optimizer step")


def label_axis(axis: Axes, title: str, unit: str, steps: str) -> None:
    """Title, unit and the name of the steps, in the project's look."""
    axis.set_title(title, loc="left", fontsize=11, color=INK)
    axis.set_ylabel(unit, fontsize=9, color=INK)
    axis.set_xlabel(steps, fontsize=9, color=INK)
    axis.tick_params(labelsize=9, colors=INK)
    axis.grid(alpha=0.25, lw=0.6)
    axis.spines[["top", "right"]].set_visible(False)
