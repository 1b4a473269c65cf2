"""Numbers in charts, verdicts and manifests, against what was worked out by hand."""

import math
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from llmalign.evaluation.plots import COLOURS
from llmalign.report import collect
from llmalign.report.collect import Run
from llmalign.report.curves import curves, reward_against_kl
from llmalign.report.figures import by_length, lengths, rounds, win_rates
from llmalign.report.markup import Html, data_block, el, say
from llmalign.report.page import _asset, render
from llmalign.report.scales import Scale, thinned, ticks, widened
from llmalign.report.summary import differences, duration, held_out_accuracy, verdict
from llmalign.secrets import hidden
from tests.report.conftest import EVIL, annotation


def test_colours_are_those_of_the_pictures() -> None:
    style = _asset("page.css")
    assert [re.search(rf"--run-{place}: (#\w+)", style).group(1) for place in range(6)] == list(COLOURS)


def test_text_is_never_markup() -> None:
    assert el("p", EVIL) == f"<p>{EVIL.replace('<', '&lt;').replace('>', '&gt;')}</p>"
    assert "<img" not in el("a", "x", title='"><img>') and el("p", Html("<b>")) == "<p><b></p>"
    assert "</script><" not in data_block("x", [EVIL])[:-9] and "&" not in data_block("x", ["&amp;"])
    with pytest.raises(ValueError):
        data_block("x", [math.nan])


def test_numbers_as_people_read_them() -> None:
    assert [say(value) for value in (None, 0.0, -0.25, 1234.5, 0.00001, 3.0)] == [
        "–", "0", "−0.25", "1,234" if round(1234.5) == 1234 else "1,235", "1.00e−05", "3"
    ]  # fmt: skip
    assert say(-0.04, 1) == "0.0" and say(12.345, 1) == "12.3"
    assert [duration(value) for value in (12.4, 300, 9000)] == ["12 s", "5 min", "2.5 h"]


def test_scales() -> None:
    assert ticks(0, 1, 5) == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1])
    assert ticks(-3, 7, 4) == pytest.approx([-2.5, 0, 2.5, 5]) and len(ticks(1e9, 1e9 + 1e-3)) < 30
    assert widened([]) == (0, 1) and widened([2, 2]) == pytest.approx((1.8, 2.2)) and widened([0]) == (-1, 1)
    assert Scale(0, 10, 100, 200)(2.5) == 125
    points = [(float(x), 0.0) for x in range(10_000)]
    points[4321] = (4321.0, 9.0)
    points[7000] = (7000.0, -9.0)
    short = thinned(points, 100)
    assert len(short) <= 100 and short == sorted(short) and {points[4321], points[7000]} <= set(short)
    assert short[0] == points[0] and short[-1] == points[-1] and thinned(points[:50]) == points[:50]


def test_curves_of_training_and_held_out_data(make_run: Callable[..., Path]) -> None:
    main, others = curves(collect([make_run()]))
    assert ["Reward accuracy" in chart for chart in main].count(True) == 1
    accuracy = next(chart for chart in main if "Reward accuracy" in chart)
    assert "rpo: from 0.5 to 0.75" in accuracy and "rpo, training: from 0.5 to 0.75" in accuracy
    assert "grad_norm" not in "".join(others)  # one finite value is no curve
    assert "learning_rate" in "".join(others) and "runtime" not in "".join(others)


def test_reward_against_kl_by_steps_and_by_rounds() -> None:
    logged = [{"step": 1, "reward": 1.0, "kl_to_reference": 0.5}, {"step": 2, "reward": 2.0, "kl_to_reference": 0.75}]
    one = [{"round": 0, "reward": {"mean": 1.5}}, {"round": 1, "reward": {"mean": 2.5}, "kl": {"mean": 0.25}}]
    runs = [Run("steps", None, history=logged), Run("rounds", None, rounds={"rounds": one})]
    chart = reward_against_kl(runs)
    assert "[[0.5,1],[0.75,2]]" in chart and "[[0,1.5],[0.25,2.5]]" in chart
    assert reward_against_kl([Run("none", None, history=[{"step": 1, "reward": 1.0}])]) is None


def test_win_rates_and_lengths(make_run: Callable[..., Path]) -> None:
    rows = [annotation(number, 2.0 if number < 15 else 1.0, output_2="x" * 100) for number in range(20)]
    runs = collect([make_run(rows=rows)])
    assert "75.0 [" in win_rates(runs)
    assert "75.0 [" in lengths(runs) and "base, the reference" in lengths(runs)
    assert "more than twice" in by_length(runs) and "less than half" not in by_length(runs)
    assert win_rates(collect([make_run("other")])) is None


def test_rounds_with_intervals() -> None:
    measured = {"mean": 0.6, "low": 0.55, "high": 0.65, "n": 40}
    run = Run("it", None, rounds={"rounds": [{"round": 0}, {"round": 1, "against_start": measured}]})
    (chart,) = rounds([run])
    assert "60.0 [55.0, 65.0]" in chart and "round 1, n = 40" in chart
    assert verdict(run).kind == "better" and "60.0 % [55.0, 65.0] of 40" in verdict(run).evidence


@pytest.mark.parametrize(
    ("rate", "low", "high", "controlled", "kind"),
    [
        (60, 55, 65, 61, "better"),
        (40, 35, 45, 41, "worse"),
        (52, 48, 56, 51, "unclear"),
        (60, 55, 65, 40, "unclear"),
        (86, 78, 90, 50.0, "unclear"),
        (60, 55, 65, 54, "better"),
    ],
)
def test_verdicts_follow_the_interval(rate: float, low: float, high: float, controlled: float, kind: str) -> None:
    rates = {"win_rate": rate, "n_rows": 10, "length_controlled_winrate": controlled}
    run = Run("r", None, evaluation={"reference": "base", "winrate": rates, "interval": {"low": low, "high": high}})
    found = verdict(run)
    assert found.kind == kind and "base" in found.headline
    assert ("length decides" in found.certainty) == (controlled in (40, 50))


def test_verdict_without_a_judge(make_run: Callable[..., Path]) -> None:
    run = collect([make_run()])[0]
    # Wilson's interval of 75 of 100, by hand: (0.75 + z²/200 ± z √(.75 .25/100 + z²/40000)) / (1 + z²/100)
    before, after, low, high, rows = held_out_accuracy(run)
    assert (before, after, rows) == (0.5, 0.75, 100) and (low, high) == pytest.approx((0.6570, 0.8246), abs=5e-4)
    assert verdict(run).kind == "better"
    assert verdict(Run("r", None)).kind == "none"
    reward = Run("r", None, metrics={"before": {"h_reward": 1.0}, "after": {"h_reward": 2.0}})
    assert verdict(reward).kind == "unclear" and verdict(reward).headline == "Reward went up"


def test_a_start_that_orders_nothing_is_even(make_run: Callable[..., Path]) -> None:
    metrics = {
        "before": {"held_rewards/accuracies": 0.0, "held_rewards/margins": 0.0},
        "after": {"held_rewards/accuracies": 0.4}, "data": {"held": {"prepared_rows": 10}},
    }  # fmt: skip
    run = collect([make_run(metrics=metrics)])[0]
    assert held_out_accuracy(run)[0] == 0.5 and verdict(run).kind == "unclear"


def test_differences_are_paired(make_run: Callable[..., Path]) -> None:
    first = [annotation(number, 2.0) for number in range(10)]
    second = [annotation(number, 1.5 if number else 1.0) for number in range(10)]
    runs = collect([make_run("a", rows=first), make_run("b", rows=second)])
    assert "a minus b: " in differences(runs) and "55.0 [" in differences(runs)
    other = [annotation(number + 100, 2.0) for number in range(10)]
    assert differences(collect([make_run("a", rows=first), make_run("c", rows=other)])) is None


def test_secrets_are_not_shown(make_run: Callable[..., Path]) -> None:
    token = "hf_" + "a1B2" * 6
    recipe = {
        "method": "rpo", "hub_token": "plain-looking", "api_key": "k", "eos_token": "<end>", "max_new_tokens": 7,
        "note": f"with {token} inside", "judge": {"password": ["deep"], "url": "https://me:pass@host/v1"},
        "credentials": {"user": "me-myself"},
    }  # fmt: skip
    page = render(collect([make_run(run=recipe)]))
    for secret in ("plain-looking", token, "deep", "me:pass", "me-myself"):
        assert secret not in page
    assert "&lt;end&gt;" in page and hidden(recipe)["max_new_tokens"] == 7 and "host/v1" in page


def test_what_is_absent_is_said_with_its_command(make_run: Callable[..., Path]) -> None:
    page = render(collect([make_run(trainer_state=None)]))
    assert 'id="curves"' not in page and 'id="outputs"' not in page and 'id="win-rates"' not in page
    assert "No training curves (rpo)" in page and "llmalign evaluate" in page and "No KL against reward" in page
    page = render(collect([make_run("pf", run={"method": "pf_ppo"}, rows=[annotation(0, 2.0)])]))
    assert "reliability.json" in page and "No win rate" not in page


def test_recipes_are_compared(make_run: Callable[..., Path]) -> None:
    page = render(collect([make_run("a", run={"beta": 0.1, "seed": 1}), make_run("b", run={"beta": 0.5, "seed": 1})]))
    differ = page.split("Where the recipes differ")[1].split("</table>")[0]
    assert "beta" in differ and "0.5" in differ and "seed" not in differ
