"""Log histories as series: what was logged in training and on held-out data, by metric."""

from collections.abc import Sequence

from llmalign.evaluation.panels import IMAGE_PANELS, PANELS, SAMPLED_PANELS, Panel
from llmalign.report.charts import Series, line_chart
from llmalign.report.collect import Run
from llmalign.report.markup import Html, listing, mapping, number
from llmalign.report.scales import Point

OTHERS = (
    Panel("kl_p_pi", "KL of the target to the policy", "nats", 0.0),
    Panel("completions/mean_length", "Length of the completions", "tokens"),
)
KNOWN = {panel.metric: panel for panel in (*PANELS[:-1], *IMAGE_PANELS[:-1], *SAMPLED_PANELS, *OTHERS, PANELS[-1])}
MOST_OTHERS = 36
NOT_CURVES = ("_runtime", "_per_second", "step_time", "total_flos", "epoch", "step", "train_loss", "rows", "num_tokens")
KL_KEYS, REWARD_KEYS = ("kl_to_reference", "kl"), ("target_reward", "reward")
HELD_OUT = "eval_"
FEWEST_HELD_OUT = 3


def curves(runs: Sequence[Run]) -> tuple[list[Html], list[Html]]:
    """A chart for every known metric that a run logged, and one for each of the others (the first 36 by name)."""
    logged = {place: _logged(run) for place, run in enumerate(runs)}
    metrics = {metric for own in logged.values() for _, metric in own}
    main = [_chart(panel, runs, logged) for panel in KNOWN.values() if panel.metric in metrics]
    others = sorted(metric for metric in metrics - KNOWN.keys() if _varies(metric, logged))
    return main, [_chart(Panel(metric, metric, "as logged"), runs, logged) for metric in others[:MOST_OTHERS]]


def reward_against_kl(runs: Sequence[Run]) -> Html | None:
    """Every run's way through the plane of KL and reward, step after step or round after round; None without any."""
    series = []
    for place, run in enumerate(runs):
        points = _by_round(run) or _by_step(run)
        if len(points) > 1:
            series.append(Series(run.name, place, points, "path"))
    if not series:
        return None
    return line_chart(
        "Reward against KL", "reward; the symbol is where a run ended", series, x_name="KL",
        x_unit="KL to the reference, nats a completion",
    )  # fmt: skip


def _logged(run: Run) -> dict[tuple[str, str], list[Point]]:
    """Points by held-out set ("train" for training) and metric; what is not finite is left out."""
    sets = sorted(_sets(run), key=len, reverse=True)
    found: dict[tuple[str, str], list[Point]] = {}
    for entry in run.history:
        for key, value in entry.items():
            known = number(value)
            if known is None or key.endswith(NOT_CURVES) or key.startswith("train_"):
                continue
            where, metric = _place(key, sets)
            found.setdefault((where, metric), []).append((float(entry["step"]), known))
    return {key: sorted(dict(points).items()) for key, points in found.items()}


def _sets(run: Run) -> set[str]:
    named = mapping(run.recipe.get("eval_datasets")) or mapping(run.metrics.get("data"))
    return {str(name) for name in named} - {"train"}


def _place(key: str, sets: Sequence[str]) -> tuple[str, str]:
    if not key.startswith(HELD_OUT):
        return "train", key
    rest = key.removeprefix(HELD_OUT)
    for name in sets:
        if rest.startswith(f"{name}_"):
            return name, rest.removeprefix(f"{name}_")
    return "", rest


def _varies(metric: str, logged: dict[int, dict[tuple[str, str], list[Point]]]) -> bool:
    values = {y for own in logged.values() for (_, name), points in own.items() if name == metric for _, y in points}
    return len(values) > 1


def _chart(panel: Panel, runs: Sequence[Run], logged: dict[int, dict[tuple[str, str], list[Point]]]) -> Html:
    series = []
    anything_held = any(where != "train" and name == panel.metric for own in logged.values() for where, name in own)
    for place, run in enumerate(runs):
        own = {where: points for (where, metric), points in logged[place].items() if metric == panel.metric}
        held = sorted(set(own) - {"train"})
        if "train" in own:
            # Where nothing is held out, it is what there is to see.
            series.append(Series(run.name, place, own["train"], "train" if anything_held else "held"))
        for dash, where in enumerate(held):
            name = f"{run.name}, {where}" if len(held) > 1 else run.name
            series.append(Series(name, place, own[where], "held", dash % 3))
    return line_chart(panel.title, panel.unit, series, level=panel.level)


def _by_round(run: Run) -> list[Point]:
    points = []
    for one in listing(run.rounds.get("rounds")):
        kl, reward = (number(mapping(mapping(one).get(key)).get("mean")) for key in ("kl", "reward"))
        if reward is not None and (kl is not None or mapping(one).get("round") == 0):
            points.append((kl or 0.0, reward))  # the start is its own reference
    return points


def _by_step(run: Run) -> list[Point]:
    """Held-out values where there are three or more of both, else the longer of these and those of training."""
    logged = _logged(run)
    best: list[Point] = []
    for where in sorted({name for name, _ in logged}, key=lambda name: name == "train"):
        kls, rewards = (
            next((dict(logged[where, key]) for key in keys if (where, key) in logged), {})
            for keys in (KL_KEYS, REWARD_KEYS)
        )
        points = [(kls[step], rewards[step]) for step in sorted(kls.keys() & rewards.keys())]
        if len(points) >= FEWEST_HELD_OUT and where != "train":
            return points
        best = max(best, points, key=len)
    return best
