"""Measuring a round: win rates, length, divergence, reward and duality gap, against numbers worked out by hand."""

import math
from pathlib import Path

import pytest

from llmalign.evaluation.winrate import bootstrap_mean, win_rate
from llmalign.loop.evaluate import MOST_CANDIDATES, duality_gap, measure
from llmalign.loop.stages import write_rows
from llmalign.rewards.functions import guard
from llmalign.rewards.preference import ModelOracle, RewardOracle
from tests.loop.games import comparisons, longer, run_of, sampled

NAN = math.nan
Logps = list[list[float]] | None
#: each beats the next with 0.8
CIRCLE = {"r": "s", "s": "p", "p": "r"}


def circle(first: str, second: str) -> float:
    """Rock, scissors, paper; anything else loses to them, and nothing can be said of a question mark."""
    if "?" in (first, second):
        return NAN
    if first == second:
        return 0.5
    return 0.8 if CIRCLE.get(first) == second or second not in CIRCLE else 0.2


def gap_of(folder: Path, own: list[list[str]], *earlier: list[list[str]], beats=circle, **loop) -> dict:
    rows = [sampled(place, texts) for place, texts in enumerate(own)]
    pool = [[sampled(place, texts) for place, texts in enumerate(texts_of)] for texts_of in earlier]
    known = comparisons(folder, beats)
    found = duality_gap(run_of(**loop), rows, [*pool, rows], known)
    found["asked"] = known.oracle.asked
    return found


def test_the_gap_of_a_policy_that_can_be_beaten(tmp_path: Path) -> None:
    """Own r r r p. P(candidate > own): r 5 5 5 2, p 8 8 8 5, s 2 2 2 8, in tenths.

    By the first half (0, 2) p is best and has 0.65 on the other; by the second p is best and has 0.8 on the first: the
    mean 0.725, and 2 * 0.725 - 1 = 0.45.
    """
    found = gap_of(tmp_path, [["r", "r", "r", "p"]], [["s", "s", "r", "p"]])
    assert found["mean"] == pytest.approx(0.45) and found["n"] == 1


def test_the_best_is_measured_where_it_was_not_chosen(tmp_path: Path) -> None:
    """Own r p, earlier s: r 5 2, p 8 5, s 2 8. On r paper is best and has 0.5 on p; on p scissors, and has 0.2 on r."""
    found = gap_of(tmp_path, [["r", "p"]], [["s", "s"]])
    assert found["mean"] == pytest.approx(2 * 0.35 - 1)


def test_the_gap_is_a_mean_over_prompts(tmp_path: Path) -> None:
    """A prompt whose policy always says r is beaten by p, seen in an earlier round, with 0.8: a gap of 0.6; if nothing
    but r was ever said, the gap is 0."""
    found = gap_of(tmp_path, [["r", "r"], ["r", "r"]], [["p", "p"], ["r", "r"]])
    expected = bootstrap_mean([0.6, 0.0], [0, 1])
    assert (found["mean"], found["n"]) == (pytest.approx(0.3), 2)
    assert (found["low"], found["high"]) == (pytest.approx(expected.low), pytest.approx(expected.high))


def test_the_newest_candidates_are_looked_at_and_each_once(tmp_path: Path) -> None:
    """The policy's own answer, which needs no question, and those of the latest rounds before."""
    earlier = [[[f"{number}{letter}" for letter in "abcdefghij"]] for number in range(8)]
    found = gap_of(tmp_path, [["r", "r"]], *earlier, [["r", "7a"]], beats=lambda a, b: 0.5)
    newest = ["7a", *(text for ((*texts,),) in reversed(earlier) for text in texts if text != "7a")]
    assert [first for _, first, _ in found["asked"]] == newest[: MOST_CANDIDATES - 1]


def test_a_comparison_that_failed_is_left_out_of_the_gap(tmp_path: Path) -> None:
    """Nothing can be said of the question mark: neither of it as a candidate, nor as the policy's own."""
    found = gap_of(tmp_path, [["r", "r", "?", "r"], ["r", "r", "r", "r"]], [["p", "?", "p", "p"], ["p", "p", "p", "p"]])
    assert found["mean"] == pytest.approx(0.6)


def test_nothing_judged_is_said_as_such(tmp_path: Path) -> None:
    found = gap_of(tmp_path, [["?", "?"]], [["?", "?"]], beats=lambda a, b: NAN)
    assert found["mean"] in (None, 0.0)  # equal texts are one half without a question
    assert gap_of(tmp_path / "other", [["a", "b"]], beats=lambda a, b: NAN)["mean"] in (None, 0.0)


class Round:
    """A folder with a round's answers to two prompts and their log-probs, as the stage leaves them to be measured."""

    def __init__(self, folder: Path, *texts: list[str], policy: Logps = None, reference: Logps = None) -> None:
        self.folder = folder
        write_rows(folder / "samples.jsonl", [sampled(place, own) for place, own in enumerate(texts)])
        for name, given in (("policy", policy), ("reference", reference)):
            values = given or [[0.0] * len(own) for own in texts]
            write_rows(folder / name / "logps.jsonl", [{"logps": own} for own in values])

    def measured(self, *earlier: list[list[str]], beats=longer, oracle=None, **loop) -> dict:
        known = comparisons(self.folder / "known", beats)
        known.oracle = oracle or known.oracle
        judge = known.oracle
        rounds = [[sampled(place, own) for place, own in enumerate(texts)] for texts in earlier]
        if isinstance(judge, RewardOracle):  # a round keeps its rewards
            rounds = [[{**row, "rewards": [*map(len, row["completions"])]} for row in rows] for rows in rounds]
        return measure(run_of(**loop), self.folder, rounds, judge, lambda asked: known)


def test_a_round_is_measured_against_the_start_and_the_round_before(tmp_path: Path) -> None:
    """Two prompts of two completions; completion i meets completion i.

    Against the start: aaa-a 0.9, b-bb 0.2; ccc-c 0.9, dd-dd 0.5: the mean 0.625. Against the round before: aaa-aaa 0.5,
    b-b 0.5; ccc-dddd 0.2, dd-d 0.9: 0.525. Ratios .5 .5, 1 -.4: a divergence of 0.4.
    """
    own = Round(
        tmp_path, ["aaa", "b"], ["ccc", "dd"], policy=[[-1.0, -2.0], [-3.0, -4.5]], reference=[[-1.5, -2.5], [-4, -4.1]]
    )  # fmt: skip
    start, before = [["a", "bb"], ["c", "dd"]], [["aaa", "b"], ["dddd", "d"]]
    found = own.measured(start, before)
    assert (found["length"]["mean"], found["length"]["n"]) == (pytest.approx((3 + 1 + 3 + 2) / 4), 4)
    assert (found["kl"]["mean"], found["kl"]["n"]) == (pytest.approx(0.4), 4)
    expected = win_rate([0.9, 0.2, 0.9, 0.5], [0, 0, 1, 1])
    assert found["against_start"] == {
        "mean": pytest.approx(0.625), "low": expected.low, "high": expected.high, "n": 4, "failed": 0,
    }  # fmt: skip
    assert found["against_previous"]["mean"] == pytest.approx(0.525)
    # A single completion has no other half to measure the gap on.
    assert set(found) == {"length", "kl", "against_start", "against_previous"}
    assert "duality_gap" in own.measured(start, before, eval_samples=2)


def test_the_start_has_nothing_to_win_against(tmp_path: Path) -> None:
    assert set(Round(tmp_path, ["aa", "b"]).measured(eval_samples=2)) == {"length", "duality_gap"}


def test_a_comparison_that_failed_is_left_out_of_the_win_rate(tmp_path: Path) -> None:
    own, start = Round(tmp_path, ["r", "?"], ["p", "?"]), [["s", "s"], ["s", "s"]]
    found = own.measured(start, beats=circle)["against_start"]  # 0.8 and 0.2 are known
    assert (found["mean"], found["n"], found["failed"]) == (pytest.approx(0.5), 2, 2)
    nothing = Round(tmp_path / "other", ["a", "b"]).measured([["c", "d"]], beats=lambda a, b: NAN)["against_start"]
    assert nothing == {"mean": None, "low": 0.0, "high": 1.0, "n": 0, "failed": 2}


def test_an_oracle_that_is_not_exact_gives_no_gap(tmp_path: Path) -> None:
    class Model:
        def score(self, prompts, first, second):
            return [0.75] * len(prompts)

    found = Round(tmp_path, ["aa", "b"]).measured([["a", "bb"]], oracle=ModelOracle(Model()), eval_samples=2)
    assert found["against_start"]["mean"] == 0.75 and "duality_gap" not in found


def letters(prompts, completions, completion_ids, **columns):
    """A reward that reads the tokens, as TRL's signature lets it."""
    return [NAN if not ids else float(len(ids)) for ids in completion_ids]


def test_rewards_are_measured_and_decide_who_wins(tmp_path: Path) -> None:
    """aa beats a, bbb loses to bbbb, the empty one has no reward, d and e tie; a reward gets the tokens every time."""
    own, oracle = Round(tmp_path, ["aa", "bbb"], ["", "d"]), RewardOracle([guard(letters)])
    found = own.measured([["a", "bbbb"], ["c", "e"]], oracle=oracle)
    assert (found["reward"]["mean"], found["reward"]["n"]) == (pytest.approx(2.0), 3)
    against = found["against_start"]
    assert (against["mean"], against["n"], against["failed"]) == (pytest.approx(0.5), 3, 1)


def test_rewards_that_all_fail_are_said_as_such(tmp_path: Path) -> None:
    found = Round(tmp_path, ["a", "b"]).measured(oracle=RewardOracle([guard(lambda **_: [NAN, NAN])]))
    assert found["reward"] == {"mean": None, "low": None, "high": None, "n": 0}
