"""Log histories as series: what was logged in training and on held-out data, by metric."""

from collections.abc import Sequence
from dataclasses import dataclass

from llmalign.report.charts import Series, line_chart
from llmalign.report.collect import Run
from llmalign.report.markup import Html, listing, mapping, number
from llmalign.report.scales import Point


@dataclass(frozen=True)
class Panel:
    """A metric with its title, its unit and a level to mark."""

    metric: str
    title: str
    unit: str
    level: float | None = None


PANELS = (
    Panel("reward", "Reward", "mean over completions, as its function gives it"),
    Panel("rewards/accuracies", "Reward accuracy", "share of pairs", 0.5),
    Panel("rewards/margins", "Reward margin", "chosen minus rejected, beta × score", 0.0),
    Panel("drift/chosen", "Drift of the chosen log-prob", "nats against the reference", 0.0),
    Panel("kl_to_reference", "Divergence from the reference", "nats a completion", 0.0),
    Panel("target_reward", "Reward of the policy", "reward"),
    Panel("satisfied", "Completions that satisfy the constraint", "share"),
    Panel("js", "Jensen-Shannon divergence to the target", "nats", 0.0),
    Panel("kl_p_pi", "KL of the target to the policy", "nats", 0.0),
    Panel("accuracy", "Accuracy", "share of pairs", 0.5),
    Panel("margin", "Margin of the scores", "chosen minus rejected", 0.0),
    Panel("error/chosen", "Denoising error of the winners", "mean square"),
    Panel("error/rejected", "Denoising error of the losers", "mean square"),
    Panel("error/winner_ratio", "The winners' error over the reference's", "ratio", 1.0),
    Panel("seppo/lagging", "Rows in which the policy lags behind", "share"),
    Panel("ratios/clipped", "Ratios outside of the band", "share"),
    Panel("entropy", "Entropy of the samples", "nats a token"),
    Panel("critic/explained_variance", "Explained variance of the critic", "share", 0.0),
    Panel("residual", "CoPG's residual", "reward"),
    Panel("mean_token_accuracy", "Next-token accuracy", "share of tokens"),
    Panel("completions/mean_length", "Length of the completions", "tokens"),
    Panel("loss", "Loss", "as the method defines it"),
)
MOST_OTHERS = 36
NOT_CURVES = ("_runtime", "_per_second", "step_time", "total_flos", "epoch", "step", "train_loss", "rows", "num_tokens")
KL_KEYS, REWARD_KEYS = ("kl_to_reference", "kl"), ("target_reward", "reward")
HELD_OUT = "eval_"
FEWEST_HELD_OUT = 3


def curves(runs: Sequence[Run]) -> tuple[list[Html], list[Html]]:
    """A chart for every known metric that a run logged, and one for each of the others (the first 36 by name)."""
    logged = {place: _logged(run) for place, run in enumerate(runs)}
    metrics = {metric for own in logged.values() for _, metric in own}
    known = {panel.metric for panel in PANELS}
    main = [_chart(panel, runs, logged) for panel in PANELS if panel.metric in metrics]
    others = sorted(metric for metric in metrics - known if _varies(metric, logged))
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
