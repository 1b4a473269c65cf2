"""Judging: what the plans ask for, in large batches, recorded as it was answered."""

import math
import random
from pathlib import Path

import pytest

from llmalign.errors import UserError
from llmalign.loop import judge as judging
from llmalign.loop.judge import judge, outcome, plan_of, rewards_of, run_plans, score
from llmalign.loop.stages import read_rows
from llmalign.rewards.functions import guard
from llmalign.rewards.preference import RewardOracle
from llmalign.rewards.tournament import FAILED, PLANS, Chosen
from tests.loop.games import comparisons, longer, run_of, sampled

NAN = math.nan
FOUR = ["aa", "b", "cccc", "ddd"]


def judged(folder: Path) -> list[dict]:
    return list(read_rows(folder / "judged.jsonl"))


def test_every_comparison_is_recorded_in_the_order_of_its_level(tmp_path: Path) -> None:
    """2 1 4 3 letters: 0 beats 1, 2 beats 3; winners 0 and 2, losers 1 and 3; 2 is the best, 1 the worst."""
    made = judge(run_of(), tmp_path, [sampled(0, FOUR)], comparisons(tmp_path, longer), seed=1)
    assert judged(tmp_path) == [
        {"place": 0, "comparisons": [[0, 1, 0.9], [2, 3, 0.9], [0, 2, 0.2], [1, 3, 0.2], [2, 1, 0.9]]}
    ]
    assert made.outputs == ["judged.jsonl"] and made.cost == {"asked": 5, "found": 0}
    assert made.counts == {"prompts": 1, "comparisons": 5, "identical": 0, "failed": 0}


def test_the_prompts_of_a_batch_go_through_their_levels_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = comparisons(tmp_path, longer)
    monkeypatch.setattr(judging, "JUDGE_PROMPTS", 2)
    judge(run_of(oracle_columns=["tag"]), tmp_path, [sampled(n, FOUR, tag=n) for n in range(3)], known, seed=1)
    assert list(map(len, known.oracle.calls)) == [4, 4, 2, 2, 2, 1]
    assert [prompt for prompt, _, _ in known.oracle.calls[0]] == ["prompt 0"] * 2 + ["prompt 1"] * 2
    assert known.oracle.columns[0] == {"tag": [0, 0, 1, 1]}
    assert [row["place"] for row in judged(tmp_path)] == [0, 1, 2]


def test_equal_answers_are_counted_and_not_asked(tmp_path: Path) -> None:
    known = comparisons(tmp_path, longer)
    made = judge(run_of(), tmp_path, [sampled(0, ["a", "a", "bb", "a"])], known, seed=1)
    # The third is the second turned round: one less what was answered. Of a tie the second is the loser.
    assert judged(tmp_path)[0]["comparisons"] == [[0, 1, 0.5], [2, 3, 0.9], [0, 2, 1 - 0.9], [1, 3, 0.5], [2, 3, 0.9]]
    assert known.oracle.asked == [("prompt 0", "bb", "a")] and made.counts["identical"] == 2
    assert made.cost == {"asked": 1, "found": 2}


def test_a_failed_comparison_is_null_and_ends_its_prompt_alone(tmp_path: Path) -> None:
    def fails_on_x(first: str, second: str) -> float:
        return NAN if "x" in (first, second) else longer(first, second)

    rows = [sampled(0, ["aa", "x", "cccc", "ddd"]), sampled(1, FOUR)]
    made = judge(run_of(), tmp_path, rows, comparisons(tmp_path, fails_on_x), seed=1)
    first, second = judged(tmp_path)
    assert first["comparisons"] == [[0, 1, None], [2, 3, 0.9]] and len(second["comparisons"]) == 5
    assert made.counts == {"prompts": 2, "comparisons": 7, "identical": 0, "failed": 1}


def test_an_oracle_without_any_answer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="2 of 2 comparisons failed.*put the oracle right, and start"):
        judge(run_of(), tmp_path, [sampled(0, FOUR)], comparisons(tmp_path, lambda a, b: NAN), seed=1)


def test_gone_on_with_the_same_is_written_and_nothing_is_asked_again(tmp_path: Path) -> None:
    rows = [sampled(n, FOUR) for n in range(3)]
    known = comparisons(tmp_path, longer)
    judge(run_of(), tmp_path, rows, known, seed=1)
    first = (tmp_path / "judged.jsonl").read_bytes()
    known.close()
    again = comparisons(tmp_path, longer)
    made = judge(run_of(), tmp_path, rows, again, seed=1)
    assert (tmp_path / "judged.jsonl").read_bytes() == first and again.oracle.calls == []
    assert made.cost == {"asked": 0, "found": 15} and made.counts["comparisons"] == 15


def test_gone_on_with_a_few_that_failed_is_no_failure_of_the_oracle(tmp_path: Path) -> None:
    """All but one answer are found again; that this one fails again says nothing of the oracle."""

    def fails_on_x(first: str, second: str) -> float:
        return NAN if "x" in (first, second) else longer(first, second)

    rows = [sampled(0, ["aa", "x", "cccc", "ddd"]), sampled(1, FOUR)]
    for _ in range(2):
        made = judge(run_of(), tmp_path, rows, comparisons(tmp_path, fails_on_x), seed=1)
        assert made.counts["failed"] == 1


def test_likelier_takes_the_probability_and_sampled_draws_by_it() -> None:
    likelier, drawing = run_of(), run_of(labels="sampled")
    assert outcome(likelier, 1, 0, 0, 1, 0.3) == 0.3
    assert outcome(drawing, 1, 0, 0, 1, 0.5) == 0.5 and math.isnan(outcome(drawing, 1, 0, 0, 1, NAN))
    drawn = [outcome(drawing, 1, place, 0, 1, 0.3) for place in range(4000)]
    assert set(drawn) == {0.0, 1.0} and abs(sum(drawn) / 4000 - 0.3) <= 4 * (0.3 * 0.7 / 4000) ** 0.5
    assert drawn == [outcome(drawing, 1, place, 0, 1, 0.3) for place in range(4000)]
    # Rounds and pairs draw each for itself.
    for other in ([outcome(drawing, 2, place, 0, 1, 0.3) for place in range(4000)],
                  [outcome(drawing, 1, place, 0, 2, 0.3) for place in range(4000)]):  # fmt: skip
        agree = sum(a == b for a, b in zip(drawn, other, strict=True)) / 4000
        assert abs(agree - 0.58) <= 4 * (0.58 * 0.42 / 4000) ** 0.5  # .3 .3 + .7 .7


def test_sampled_labels_steer_the_bracket_and_the_probability_is_what_is_recorded(tmp_path: Path) -> None:
    run = run_of(labels="sampled")
    judge(run, tmp_path, [sampled(place, FOUR) for place in range(20)], comparisons(tmp_path, longer), seed=1)
    brackets = set()
    for row in judged(tmp_path):
        assert all(p in (0.9, 0.2) for *_, p in row["comparisons"])
        first, second = (outcome(run, 1, row["place"], *pair, 0.9) for pair in ((0, 1), (2, 3)))
        winners = (0 if first else 1, 2 if second else 3)
        assert tuple(row["comparisons"][2][:2]) == winners
        brackets.add(winners)
    assert len(brackets) > 1


def test_what_a_plan_draws_depends_on_round_and_place_alone() -> None:
    def other(seed: int, place: int) -> int:
        """Whom the first answer, which wins everything, meets at last."""
        plan = plan_of(run_of(select="best_random"), sampled(place, FOUR), seed)
        next(plan)
        assert plan.send([1.0, 1.0]) == [(0, 2)]
        ((best, drawn),) = plan.send([1.0])
        assert best == 0
        return drawn

    drawn = [other(1, place) for place in range(30)]
    assert drawn == [other(1, place) for place in range(30)] and set(drawn) == {1, 2, 3}
    assert drawn != [other(2, place) for place in range(30)]


def test_plans_of_different_sizes_end_each_in_its_own_level() -> None:
    asked = []

    def ask(level):
        asked.append(level)
        return [NAN if number == 1 else 1.0 for number, _ in level]

    plans = [PLANS["best_worst"](count, random.Random(0)) for count in (2, 4, 4)]
    assert run_plans(plans, ask) == [Chosen([(0, 1)]), Chosen(dropped={FAILED: 1}), Chosen([(0, 3)])]
    assert asked == [
        [(0, (0, 1)), (1, (0, 1)), (1, (2, 3)), (2, (0, 1)), (2, (2, 3))],
        [(0, (0, 1)), (2, (0, 2)), (2, (1, 3))],
        [(2, (0, 3))],
    ]


def length_less_tag(prompts, completions, completion_ids, tag):
    assert [len(ids) for ids in completion_ids] == [len(text) for text in completions]
    return [NAN if text == "x" else len(text) - own for text, own in zip(completions, tag, strict=True)]


def test_rewards_are_recorded_answer_by_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(judging, "JUDGE_PROMPTS", 1)
    run = run_of(oracle="reward", reward_funcs=["mine.py:f"], oracle_columns=["tag"])
    oracle = RewardOracle([guard(length_less_tag)])
    rows = [sampled(0, ["aaa", "x"], tag=1), sampled(1, ["b", "cc"], tag=0)]
    made = score(run, tmp_path, rows, oracle)
    assert judged(tmp_path) == [{"place": 0, "rewards": [2.0, None]}, {"place": 1, "rewards": [1.0, 2.0]}]
    assert made.counts == {"prompts": 2, "rewards": 4, "failed": 1}
    assert made.measured == {"mean_reward": pytest.approx(5 / 3)}
    assert rewards_of(run, rows, oracle) == [2.0, None, 1.0, 2.0]


def test_rewards_that_all_fail_are_refused(tmp_path: Path) -> None:
    run = run_of(oracle="reward", reward_funcs=["mine.py:f"])
    with pytest.raises(UserError, match="4 of 4 rewards failed.*put the oracle right, and start"):
        score(run, tmp_path, [sampled(0, FOUR)], RewardOracle([guard(lambda **_: [NAN] * 4)]))


def test_rewards_that_failed_are_asked_for_again(tmp_path: Path) -> None:
    """A reward that was away when it was asked and is back for the same command; what it did say is not asked again."""
    run, away, asked = run_of(oracle="reward", reward_funcs=["mine.py:f"], max_failed=0.1), [True], []

    def reward(prompts, completions, **columns):
        asked.extend(completions)
        return [NAN if away[0] and text == "b" else float(len(text)) for text in completions]

    with pytest.raises(UserError, match="1 of 4 rewards failed"):
        score(run, tmp_path, [sampled(0, FOUR)], RewardOracle([guard(reward)]))
    away[0] = False
    score(run, tmp_path, [sampled(0, FOUR)], RewardOracle([guard(reward)]))
    assert judged(tmp_path) == [{"place": 0, "rewards": [2.0, 1.0, 4.0, 3.0]}]
