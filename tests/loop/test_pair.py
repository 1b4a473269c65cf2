"""Pairing: from recorded comparisons or rewards to the rows that are trained on, and why others are not."""

import math
from pathlib import Path

import pytest

from llmalign.errors import UserError
from llmalign.loop.judge import judge
from llmalign.loop.pair import pair
from llmalign.loop.stages import read_rows
from tests.loop.games import comparisons, run_of, sampled

FOUR = ["aa", "b", "cccc", "ddd"]
BY_REWARD = {"oracle": "reward", "reward_funcs": ["mine.py:f"]}


def pairs(folder: Path) -> list[dict]:
    return list(read_rows(folder / "pairs.jsonl"))


def texts(folder: Path) -> list[tuple[str, str]]:
    return [(row["chosen"], row["rejected"]) for row in pairs(folder)]


def compared(place: int, *records: list) -> dict:
    return {"place": place, "comparisons": [list(record) for record in records]}


def test_a_pair_has_its_texts_its_tokens_and_a_number(tmp_path: Path) -> None:
    samples = [sampled(0, FOUR), sampled(1, ["x", "yy"])]
    verdicts = [
        compared(0, (0, 1, 0.9), (2, 3, 0.9), (0, 2, 0.2), (1, 3, 0.2), (2, 1, 0.9)),
        compared(1, (0, 1, 1.0)),  # the first level and the last one are the same comparison
    ]
    made = pair(run_of(), tmp_path, samples, verdicts, seed=1)
    assert pairs(tmp_path) == [
        {
            "row_id": 0, "prompt": "prompt 0", "chosen": "cccc", "rejected": "b", "prompt_ids": [5, 0],
            "chosen_ids": [99] * 4, "rejected_ids": [98],
        },
        {
            "row_id": 1, "prompt": "prompt 1", "chosen": "x", "rejected": "yy", "prompt_ids": [5, 1],
            "chosen_ids": [120], "rejected_ids": [121, 121],
        },
    ]  # fmt: skip
    assert made.counts == {"prompts": 2, "pairs": 2, "dropped": {}} and made.outputs == ["pairs.jsonl"]
    assert made.measured == {"chosen_longer": 0.5}


def test_what_is_dropped_is_counted_by_its_reason(tmp_path: Path) -> None:
    two = ["aa", "bb"]
    samples = [sampled(n, two) for n in range(4)] + [sampled(4, ["same", "same"]), sampled(5, FOUR)]
    samples[5]["completions"] = ["one", "text", "text", "one"]  # different tokens, equal texts
    verdicts = [
        compared(0, (0, 1, 0.9)),
        compared(1, (0, 1, 0.5)),
        compared(2, (0, 1, 0.2), (1, 0, 0.3)),
        compared(3, (0, 1, None)),
        compared(4, (0, 1, 0.5)),
        compared(5, (0, 1, 0.9), (2, 3, 0.2), (0, 3, 0.5), (1, 2, 0.5), (0, 2, 0.9)),
    ]
    made = pair(run_of(), tmp_path, samples, verdicts, seed=1)
    assert texts(tmp_path) == [("aa", "bb"), ("one", "text")]
    assert made.counts["dropped"] == {"tie": 1, "same_answer": 1, "winner_lost_to_loser": 1, "failed": 1}


def test_equal_texts_are_no_pair_whatever_was_said_of_them(tmp_path: Path) -> None:
    samples = [sampled(0, ["a", "a"]), sampled(1, ["a", "b"])]
    made = pair(run_of(), tmp_path, samples, [compared(0, (0, 1, 0.9)), compared(1, (0, 1, 0.9))], seed=1)
    assert texts(tmp_path) == [("a", "b")] and made.counts["dropped"] == {"same_answer": 1}


def test_answers_that_were_cut_are_dropped_on_request(tmp_path: Path) -> None:
    samples = [sampled(0, ["aa!", "b!"]), sampled(1, ["aa", "b!"]), sampled(2, ["aa!", "b"])]
    verdicts = [compared(place, (0, 1, 0.9)) for place in range(3)]
    assert pair(run_of(), tmp_path, samples, verdicts, seed=1).counts["pairs"] == 3
    made = pair(run_of(truncated="drop"), tmp_path, samples, verdicts, seed=1)
    assert texts(tmp_path) == [("aa!", "b!")] and made.counts["dropped"] == {"truncated": 2}


def test_an_answer_without_a_token_is_never_trained_on(tmp_path: Path) -> None:
    samples = [sampled(0, ["", "b"]), sampled(1, ["a", "b"])]
    pair(run_of(), tmp_path, samples, [compared(n, (0, 1, 0.9)) for n in range(2)], seed=1)
    assert texts(tmp_path) == [("a", "b")]


@pytest.mark.parametrize("select", ["best_worst", "best_random", "all_pairs", "independent"])
@pytest.mark.parametrize("labels", ["likelier", "sampled"])
def test_what_was_judged_can_be_paired_again(select: str, labels: str, tmp_path: Path) -> None:
    """A plan that draws draws again what it drew when it asked: every comparison that it needs is on record."""
    run = run_of(select=select, labels=labels)
    samples = [
        sampled(place, [letter * (1 + (place * n) % 5) for n, letter in enumerate("abcdefg")]) for place in range(30)
    ]
    known = comparisons(tmp_path, lambda a, b: 0.5 if len(a) == len(b) else 0.6 if len(a) > len(b) else 0.4)
    judge(run, tmp_path, samples, known, seed=1)
    verdicts = list(read_rows(tmp_path / "judged.jsonl"))
    pair(run, tmp_path, samples, verdicts, seed=1)
    first = (tmp_path / "pairs.jsonl").read_bytes()
    pair(run, tmp_path, samples, verdicts, seed=1)
    assert (tmp_path / "pairs.jsonl").read_bytes() == first
    if labels == "likelier":
        assert all(len(chosen) > len(rejected) for chosen, rejected in texts(tmp_path))
    else:  # 0.4 and 0.6 are drawn by: some of the shorter win
        assert any(len(chosen) < len(rejected) for chosen, rejected in texts(tmp_path))


def rewarded(place: int, *rewards: float | None) -> dict:
    return {"place": place, "rewards": list(rewards)}


def test_by_reward_the_best_meets_the_worst(tmp_path: Path) -> None:
    samples = [sampled(0, FOUR), sampled(1, FOUR), sampled(2, FOUR), sampled(3, FOUR)]
    verdicts = [
        rewarded(0, 1.0, 3.0, None, -2.0), rewarded(1, 1.0, 1.0, 1.0, 1.0), rewarded(2, None, None, None, 4.0),
        rewarded(3, 0.0, 0.2, 0.1, 0.0),
    ]  # fmt: skip
    made = pair(run_of(**BY_REWARD, margin=0.5), tmp_path, samples, verdicts, seed=1)
    assert texts(tmp_path) == [("b", "ddd")]
    assert made.counts["dropped"] == {"unscored": 4, "ties": 1, "alone": 1, "below_margin": 1}
    pair(run_of(**BY_REWARD), tmp_path, samples, verdicts, seed=1)
    assert texts(tmp_path) == [("b", "ddd"), ("b", "aa")]  # of equal rewards the first is the worst


def test_all_pairs_by_reward_need_their_margin(tmp_path: Path) -> None:
    run = run_of(**BY_REWARD, select="all_pairs", margin=2.0)
    pair(run, tmp_path, [sampled(0, FOUR)], [rewarded(0, 1.0, 3.0, None, -2.0)], seed=1)
    assert sorted(texts(tmp_path)) == [("aa", "ddd"), ("b", "aa"), ("b", "ddd")]


def test_best_random_by_reward_draws_by_round_and_place(tmp_path: Path) -> None:
    run = run_of(**BY_REWARD, select="best_random")
    samples = [sampled(place, FOUR) for place in range(40)]
    verdicts = [rewarded(place, 1.0, 2.0, 9.0, 3.0) for place in range(40)]
    pair(run, tmp_path, samples, verdicts, seed=1)
    first = texts(tmp_path)
    assert {chosen for chosen, _ in first} == {"cccc"} and {rejected for _, rejected in first} == {"aa", "b", "ddd"}
    pair(run, tmp_path, samples, verdicts, seed=2)
    assert texts(tmp_path) != first


def test_independent_pairs_by_reward_are_neighbours(tmp_path: Path) -> None:
    run = run_of(**BY_REWARD, select="independent")
    samples = [sampled(0, FOUR), sampled(1, FOUR)]
    made = pair(run, tmp_path, samples, [rewarded(0, 1.0, 2.0, 3.0, 3.0), rewarded(1, 1.0, 0.0, None, 2.0)], seed=1)
    # What is not known of two answers costs the others nothing.
    assert texts(tmp_path) == [("b", "aa"), ("aa", "b")] and made.counts["dropped"] == {
        "ties": 1, "unscored": 1, "alone": 1,
    }  # fmt: skip


def test_independent_pairs_by_reward_need_their_margin(tmp_path: Path) -> None:
    """A key that is set is never left unread."""
    run = run_of(**BY_REWARD, select="independent", margin=1.5)
    pair(run, tmp_path, [sampled(0, FOUR)], [rewarded(0, 1.0, 2.0, 5.0, 3.0)], seed=1)
    assert texts(tmp_path) == [("cccc", "ddd")]


def test_groups_keep_every_rewarded_answer(tmp_path: Path) -> None:
    run = run_of(groups=True, truncated="drop", **BY_REWARD)
    samples = [sampled(0, ["aa!", "b!", "c!", "d"]), sampled(1, ["aa!", "b", "c!"]), sampled(2, ["aa!", "b!"])]
    verdicts = [rewarded(0, 1.0, None, 2.0, 3.0), rewarded(1, 1.0, 1.0, None), rewarded(2, 1.0, 1.0)]
    made = pair(run, tmp_path, samples, verdicts, seed=1)
    first, second = pairs(tmp_path)
    assert first == {
        "row_id": 0, "prompt": "prompt 0", "completions": ["aa!", "c!"],
        "completion_ids": [[97, 97, 33], [99, 33]], "rewards": [1.0, 2.0], "prompt_ids": [5, 0],
    }  # fmt: skip
    assert (second["row_id"], second["rewards"]) == (1, [1.0, 1.0])  # a tie is no fault of a group
    assert made.counts == {
        "prompts": 3, "groups": 2, "dropped": {"failed": 2, "truncated": 2, "fewer_than_two": 1},
    }  # fmt: skip
    assert made.measured == {}


@pytest.mark.parametrize(
    ("run", "verdicts", "reasons"),
    [
        (run_of(), [compared(0, (0, 1, 0.5)), compared(1, (0, 1, None))], "1 tie, 1 failed"),
        (
            run_of(groups=True, **BY_REWARD), [rewarded(0, 1.0, None), rewarded(1, None, None)],
            "3 failed, 2 fewer_than_two",
        ),
    ],
)  # fmt: skip
def test_nothing_to_train_on_is_refused_with_the_reasons(run, verdicts, reasons, tmp_path: Path) -> None:
    with pytest.raises(UserError) as refused:
        pair(run, tmp_path, [sampled(n, ["a", "b"]) for n in range(2)], verdicts, seed=1)
    assert f"no pair is left to train on ({reasons})" in str(refused.value) and "temperature" in str(refused.value)
    assert not (tmp_path / "pairs.jsonl").exists()


def test_a_row_s_rewards_are_finite_or_left_out(tmp_path: Path) -> None:
    run = run_of(**BY_REWARD)
    pair(run, tmp_path, [sampled(0, ["a", "b", "c"])], [rewarded(0, math.inf, 1.0, 2.0)], seed=1)
    assert texts(tmp_path) == [("c", "b")]
