"""Preferences between stories: one transitive, one not, both read from the words alone."""

import math

import pytest

from llmalign.embedded.rewards import better
from llmalign.embedded.rows import pair_rows
from llmalign.embedded.stories import CYCLE, intransitive, livelier, liveliness, openings, story_class
from llmalign.embedded.truth import score


@pytest.mark.parametrize(
    ("story", "traits", "name"),
    [
        ("", 0, 3),
        ("There was nobody.", 0, 3),
        ("The Dog ate a cake.", 2, 0),  # an animal and food; the first of the classes counts
        ("A cake for the dogs!", 2, 1),
        ("They walked to the lake, and the foxes shared.", 2, 2),  # plurals are read, other forms are not
        ("He was happy and said: help! Dog, cake, tree.", 6, 0),
        ("catalogue and carthorse", 0, 3),
    ],
)
def test_what_a_story_has_is_read_from_its_words(story: str, traits: int, name: int) -> None:
    assert (liveliness(story), story_class(story)) == (traits, name)


def test_the_livelier_story_is_likelier_to_be_preferred() -> None:
    given = livelier(["p"] * 3, ["The dog ate.", "Nothing.", "Dog."], ["Nothing.", "The dog ate.", "Cat."])
    assert given == [pytest.approx(1 / (1 + math.exp(-2))), pytest.approx(1 / (1 + math.exp(2))), 0.5]


def test_classes_beat_each_other_in_a_circle() -> None:
    dog, cake, tree, none = "dog", "cake", "tree", "nothing"
    given = intransitive(["p"] * 5, [dog, cake, tree, none, dog], [cake, tree, dog, dog, dog])
    assert given == [0.8, 0.8, 0.8, 0.2, 0.5]
    assert all(CYCLE[a][b] + CYCLE[b][a] == 1 for a in range(4) for b in range(4))


def test_openings_give_nothing_away_but_their_hero() -> None:
    assert len(set(openings(1400))) == 1400
    with pytest.raises(ValueError, match="larger than population"):
        openings(1401)


def test_in_the_embedded_world_the_better_answer_is_likelier_to_be_preferred() -> None:
    rows = pair_rows(20, 0)
    columns = [[row[key] for row in rows] for key in ("prompt", "chosen", "rejected")]
    expected = [
        1 / (1 + math.exp(score(row["prompt"], row["rejected"]) - score(row["prompt"], row["chosen"]))) for row in rows
    ]
    assert better(*columns) == pytest.approx(expected) and min(better(*columns)) > 0.5
