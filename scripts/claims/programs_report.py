"""What the programming claim says of its cells: a verdict, two tables in one and a picture."""

from typing import Any

from claims.cells import Result
from claims.report import Figure, Interval, Outcome, draw_bands, interval, values

LABELS = {
    "ppo_s": "PPO-S, 1 each of 5 times the tasks",
    "ppo_m": "PPO-M, all of 5",
    "best_of_n": "best of 5",
    "best_random": "best and a random of 5",
    "best_worst": "best and worst of 5",
}
#: what the reliability of a strategy is listed under, by what it is called in training
STRATEGIES = {"ppo_m": "none", "best_of_n": "best_of_n", "best_random": "best_random", "best_worst": "best_worst"}
KEYS = ("passed", "greedy", "share", "reward", "kl", "explained")
STATEMENT = (
    "With equally many programs sampled, PPO on the best and a random or the best and the worst program of each task "
    "ends with a higher share of held-out programs that pass all tests than PPO on all of them (the 95 % interval of "
    "the difference above 0, paired by seed), PPO on the best alone with a lower one, and the strategy of the "
    "highest R^2 before training is the one that ends highest."
)


def _r2(records: list[Result], strategy: str, key: str = "r2") -> list[float]:
    """The strategy's R^2 (or another statistic) of each seed, 0 where it is undefined."""
    found = values(records, "strategies", method="beforehand")
    own = [next(one[key]["value"] for one in run if one["name"] == strategy) for run in found]
    return [0.0 if value is None else value for value in own]


def _leads(numbers: dict[str, dict[str, list[float]]], methods: list[str], key: str) -> dict[str, Interval]:
    """Each method's end above that of PPO-M, paired by seed."""
    base = numbers[key]["ppo_m"]
    return {
        m: interval([own - other for own, other in zip(numbers[key][m], base, strict=True)])
        for m in methods
        if m != "ppo_m"
    }


def judge(records: list[Result]) -> Outcome:
    found = [m for m in LABELS if values(records, "last_passed", method=m)]
    numbers = {key: {m: values(records, f"last_{key}", method=m) for m in found} for key in KEYS}
    curves = {key: {m: values(records, key, method=m) for m in found} for key in KEYS}
    programs = values(records, "programs", method=found[0])[0]
    first = {key: interval([run[0] for m in found for run in curves[key][m]]) for key in KEYS[:4]}
    reliable = {name: _r2(records, name) for name in STRATEGIES.values()}
    leads = _leads(numbers, found, "passed") if "ppo_m" in found else {}
    return Outcome(
        holds=_holds(leads, reliable, numbers["passed"]),
        verdict=_verdict(records, leads, reliable, first, numbers),
        columns=[
            "method", "pass all tests", "greedy", "share of tests", "reward", "KL to the start, nats",
            "critic's explained variance", "R^2 before training", "rank correlation",
        ],
        rows=[
            ["start", *(first[key].text() for key in KEYS[:4]), "0", "", "", ""],
            *([LABELS[m], *(interval(numbers[key][m]).text() for key in KEYS), *_before(records, m)] for m in found),
        ],
        numbers={"programs": programs, "r2": reliable, **curves},
        draw=lambda figure: _draw(figure, programs, curves, reliable, found),
    )  # fmt: skip


def _before(records: list[Result], method: str) -> list[str]:
    if method not in STRATEGIES:
        return ["", ""]
    return [interval(_r2(records, STRATEGIES[method], key)).text() for key in ("r2", "spearman")]


def _best_strategy(reliable: dict[str, list[float]]) -> str:
    return max(reliable, key=lambda name: sum(reliable[name]))


def _best_method(passed: dict[str, list[float]]) -> str:
    return max((m for m in passed if m in STRATEGIES), key=lambda m: sum(passed[m]))


def _holds(leads: dict[str, Interval], reliable: dict[str, list[float]], passed: dict[str, list[float]]) -> bool:
    if set(LABELS) - {"ppo_m"} != set(leads):
        return False
    filtered = leads["best_random"].low > 0 and leads["best_worst"].low > 0
    right = STRATEGIES[_best_method(passed)] == _best_strategy(reliable)
    return filtered and leads["best_of_n"].high < 0 and right


def _verdict(
    records: list[Result],
    leads: dict[str, Interval],
    reliable: dict[str, list[float]],
    first: dict[str, Interval],
    numbers: dict[str, dict[str, list[float]]],
) -> str:
    recommended = values(records, "recommended", method="beforehand")
    said = [f"{name} on {recommended.count(name)}" for name in dict.fromkeys(recommended)]
    r2 = ", ".join(f"{name} {interval(own).text(2)}" for name, own in reliable.items())
    ends = ", ".join(f"{LABELS[m]} {interval(own).text(2)}" for m, own in numbers["passed"].items())
    text = (
        f"R^2 before training: {r2}; recommended: {', '.join(said)} of {len(recommended)} seeds. Of the sampled "
        f"held-out programs {first['passed'].mean:.2f} pass all tests at the start, at the end: {ends}."
    )
    if leads:
        against = ", ".join(f"{LABELS[m]} {lead.text(2)}" for m, lead in leads.items())
        best = _best_method(numbers["passed"])
        text += (
            f" Against PPO-M, paired by seed: {against}. The highest R^2 is that of {_best_strategy(reliable)}, the "
            f"highest end on average that of {STRATEGIES[best]}."
        )
    return text


def _draw(
    figure: Figure, programs: list[float], curves: dict[str, Any], reliable: dict[str, Any], methods: list[str]
) -> None:
    titles = {"passed": "Sampled programs that pass", "greedy": "Greedy programs that pass"}
    left, middle, right = figure.subplots(1, 3)
    for axes, (key, title) in zip((left, middle), titles.items(), strict=True):
        for number, method in enumerate(methods):
            draw_bands(axes, programs, curves[key][method], LABELS[method], f"C{number}")
        axes.set(xlabel="programs sampled", title=title)
    left.legend(fontsize=6)
    middle.sharey(left)
    bars = [interval(own) for own in reliable.values()]
    right.bar(list(reliable), [bar.mean for bar in bars], yerr=[bar.half for bar in bars], color="0.6", capsize=3)
    right.tick_params(axis="x", labelrotation=40, labelsize=7)
    right.set(title="R^2 before training")
