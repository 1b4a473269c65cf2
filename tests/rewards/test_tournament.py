"""The tournament and its sister plans: which answers meet, who goes on, what is kept, what it costs."""

import math
import random
from itertools import combinations

import pytest

from llmalign.errors import UserError
from llmalign.rewards.tournament import DISAGREED, FAILED, PLANS, TIE, Chosen, comparisons_of

FORWARD = [index / 10 for index in range(8)]  # of two answers the later is the better


def play(select, count, beats, seed=0):
    """The levels that a plan asked for and what it came to; `beats(first, second)` is the outcome."""
    plan, levels = PLANS[select](count, random.Random(seed)), []
    try:
        level = next(plan)
        while True:
            levels.append(level)
            level = plan.send([beats(*pair) for pair in level])
    except StopIteration as stop:
        return levels, stop.value


def by_strength(strengths):
    return lambda a, b: 0.5 if strengths[a] == strengths[b] else float(strengths[a] > strengths[b])


def plain_tournament(count, beats):
    """The procedure of the paper's appendix, bracket by bracket and without levels: its pair or None, and all games."""
    games = []

    def play_round(entrants, wanted):
        left = []
        for place in range(0, len(entrants) - 1, 2):
            first, second = entrants[place], entrants[place + 1]
            games.append((first, second))
            winner, loser = (first, second) if beats(first, second) >= 0.5 else (second, first)
            left.append(winner if wanted == "winner" else loser)
        return left + ([entrants[-1]] if len(entrants) % 2 else [])

    winners = losers = list(range(count))
    winners = play_round(winners, "winner")
    seen = len(games)
    losers = play_round(losers, "loser")
    del games[seen:]  # the first level is one and the same
    while len(winners) > 1:
        winners = play_round(winners, "winner")
    while len(losers) > 1:
        losers = play_round(losers, "loser")
    best, worst = winners[0], losers[0]
    if best == worst:
        return None, games
    games.append((best, worst))
    return ((best, worst) if beats(best, worst) > 0.5 else None), games


def test_eight_answers_take_eleven_comparisons_in_the_bracket_of_the_paper():
    """Strengths 3 1 4 1.5 9 2 6 5, worked out by hand: 4 games, then 2 and 1 of the winners, 2 and 1 of the losers."""
    levels, chosen = play("best_worst", 8, by_strength([3, 1, 4, 1.5, 9, 2, 6, 5]))
    assert levels == [
        [(0, 1), (2, 3), (4, 5), (6, 7)],
        [(0, 2), (4, 6), (1, 3), (5, 7)],  # winners 0 2 4 6, losers 1 3 5 7
        [(2, 4), (1, 5)],
        [(4, 1)],
    ]
    assert chosen == Chosen([(4, 1)]) and sum(map(len, levels)) == 11


def test_of_a_tie_the_first_is_the_winner_and_the_second_the_loser():
    levels, chosen = play("best_worst", 4, lambda a, b: 0.5 if (a, b) != (0, 3) else 1.0)
    assert levels == [[(0, 1), (2, 3)], [(0, 2), (1, 3)], [(0, 3)]]
    assert chosen == Chosen([(0, 3)])


@pytest.mark.parametrize(
    ("last", "expected"),
    [
        (1.0, Chosen([(0, 3)])),
        (0.51, Chosen([(0, 3)])),
        (0.5, Chosen(dropped={TIE: 1})),
        (0.49, Chosen(dropped={DISAGREED: 1})),
        (0.0, Chosen(dropped={DISAGREED: 1})),
    ],
)
def test_the_pair_is_kept_only_if_the_best_beats_the_worst(last, expected):
    """0 wins its bracket, 3 loses its own, and only then do the two meet."""
    won = {(0, 1): 0.9, (2, 3): 0.6, (0, 2): 0.7, (1, 3): 0.8, (0, 3): last}
    levels, chosen = play("best_worst", 4, lambda a, b: won[a, b])
    assert levels[-1] == [(0, 3)] and chosen == expected


def test_two_answers_meet_twice():
    """The first level says who is best and who is worst; the last one asks whether it holds."""
    assert play("best_worst", 2, by_strength([1, 2])) == ([[(0, 1)], [(1, 0)]], Chosen([(1, 0)]))
    assert play("best_worst", 2, lambda a, b: 0.5) == ([[(0, 1)], [(0, 1)]], Chosen(dropped={TIE: 1}))
    # An oracle that always prefers the first: 0 wins, and wins again.
    assert play("best_worst", 2, lambda a, b: 1.0)[1] == Chosen([(0, 1)])
    assert play("best_worst", 2, lambda a, b: 0.0)[1] == Chosen(dropped={DISAGREED: 1})


def test_of_three_answers_the_odd_one_out_meets_winner_and_loser():
    levels, chosen = play("best_worst", 3, by_strength([1, 3, 2]))
    assert levels == [[(0, 1)], [(1, 2), (0, 2)], [(1, 0)]] and chosen == Chosen([(1, 0)])
    # It may come out as the best and as the worst at once, where preferences run in a circle: nothing is kept.
    circle = {(0, 1): 1.0, (0, 2): 0.0, (1, 2): 1.0}
    levels, chosen = play("best_worst", 3, lambda a, b: circle[a, b])
    assert levels == [[(0, 1)], [(0, 2), (1, 2)]] and chosen == Chosen(dropped={DISAGREED: 1})


def test_five_answers_by_hand():
    """0-1 and 2-3 meet, 4 waits; in both brackets the first two meet and 4 waits again; then each meets 4."""
    levels, chosen = play("best_worst", 5, by_strength([5, 1, 4, 2, 3]))
    assert levels == [[(0, 1), (2, 3)], [(0, 2), (1, 3)], [(0, 4), (1, 4)], [(0, 1)]]
    assert chosen == Chosen([(0, 1)])


@pytest.mark.parametrize("count", range(2, 14))
def test_random_preferences_come_to_what_a_plain_implementation_comes_to(count):
    """Ties and circles included; and where a strength decides, the best is the strongest, the worst the weakest."""
    rng = random.Random(count)
    for _ in range(40):
        table = {}
        for a, b in combinations(range(count), 2):
            table[a, b] = rng.choice([0.0, 0.1, 0.4, 0.5, 0.6, 0.9, 1.0])
            table[b, a] = 1 - table[a, b]
        pair, games = plain_tournament(count, lambda a, b: table[a, b])  # noqa: B023
        levels, chosen = play("best_worst", count, lambda a, b: table[a, b])  # noqa: B023
        assert chosen.pairs == ([] if pair is None else [pair])
        assert sum(chosen.dropped.values()) == (pair is None)
        assert sorted(one for level in levels for one in level) == sorted(games)

        strengths = rng.sample(range(100), count)
        _, chosen = play("best_worst", count, by_strength(strengths))
        order = sorted(range(count), key=strengths.__getitem__)
        assert chosen == Chosen([(order[-1], order[0])])


@pytest.mark.parametrize("count", range(2, 10))
def test_best_random_is_the_winner_against_any_other(count):
    rng, seen = random.Random(count), set()
    for seed in range(60):
        strengths = rng.sample(range(100), count)
        best = max(range(count), key=strengths.__getitem__)
        levels, chosen = play("best_random", count, by_strength(strengths), seed)
        (other,) = [rejected for _, rejected in chosen.pairs]
        assert chosen.pairs == [(best, other)] and other != best
        assert sum(map(len, levels)) == count and levels[-1] == [(best, other)]
        seen.add(sorted(set(range(count)) - {best}).index(other))
    assert seen == set(range(count - 1)), "some answer is never drawn"


def test_best_random_drops_what_does_not_win():
    assert play("best_random", 2, lambda a, b: 0.5)[1] == Chosen(dropped={TIE: 1})
    levels, chosen = play("best_random", 2, lambda a, b: 0.0)  # 1 beats 0, and loses where it stands first
    assert levels == [[(0, 1)], [(1, 0)]] and chosen == Chosen(dropped={DISAGREED: 1})


def test_all_pairs_have_the_winner_first_and_count_ties():
    levels, chosen = play("all_pairs", 4, by_strength([2, 1, 2, 3]))
    assert levels == [[(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)]]
    assert chosen == Chosen([(0, 1), (3, 0), (2, 1), (3, 1), (3, 2)], {TIE: 1})


def test_independent_pairs_share_no_answer():
    levels, chosen = play("independent", 5, by_strength([1, 2, 4, 3, 9]))
    assert levels == [[(0, 1), (2, 3)]] and chosen == Chosen([(1, 0), (2, 3)])
    assert play("independent", 4, lambda a, b: 0.5)[1] == Chosen(dropped={TIE: 2})


@pytest.mark.parametrize(
    ("select", "counts"),
    [
        # by hand, for 2, 3, 4, 5, 8 answers
        ("best_worst", {2: 2, 3: 4, 4: 5, 5: 7, 8: 11}),
        ("best_random", {2: 2, 3: 3, 4: 4, 5: 5, 8: 8}),
        ("all_pairs", {2: 1, 3: 3, 4: 6, 5: 10, 8: 28}),
        ("independent", {2: 1, 3: 1, 4: 2, 5: 2, 8: 4}),
    ],
)
def test_the_number_of_comparisons_is_known_ahead(select, counts):
    assert {count: comparisons_of(select, count) for count in counts} == counts
    for count, expected in counts.items():
        levels, _ = play(select, count, by_strength(FORWARD))
        assert sum(map(len, levels)) == expected


def test_an_unknown_plan_and_a_single_answer_are_refused():
    with pytest.raises(UserError, match="select takes best_worst, best_random, all_pairs, independent; got 'best'"):
        comparisons_of("best", 8)
    with pytest.raises(UserError, match="samples_per_prompt must be at least 2 to compare answers, got 1"):
        comparisons_of("best_worst", 1)


@pytest.mark.parametrize(
    ("select", "unknown", "levels", "expected"),
    [
        ("best_worst", (2, 3), 1, Chosen(dropped={FAILED: 1})),
        ("best_worst", (1, 3), 2, Chosen(dropped={FAILED: 1})),
        ("best_worst", (0, 3), 3, Chosen(dropped={FAILED: 1})),
        ("best_random", (0, 2), 2, Chosen(dropped={FAILED: 1})),
        ("all_pairs", (0, 2), 1, Chosen([(0, 1), (0, 3), (1, 2), (1, 3), (2, 3)], {FAILED: 1})),
        ("independent", (2, 3), 1, Chosen([(0, 1)], {FAILED: 1})),
    ],
)
def test_what_is_not_known_costs_a_tournament_its_pair_and_elsewhere_itself(select, unknown, levels, expected):
    asked, chosen = play(select, 4, lambda a, b: math.nan if (a, b) == unknown else 1.0)
    assert len(asked) == levels and chosen == expected


@pytest.mark.parametrize("select", sorted(PLANS))
def test_recorded_outcomes_give_the_same_pairs_again(select):
    rng = random.Random(7)
    for count in (2, 3, 5, 8):
        for seed in range(20):
            recorded = {}

            def asked(a, b, recorded=recorded):
                return recorded.setdefault((a, b), rng.choice([0.0, 0.3, 0.5, 0.8, 1.0]))

            first = play(select, count, asked, seed)
            assert play(select, count, lambda a, b, known=recorded: known[a, b], seed) == first
