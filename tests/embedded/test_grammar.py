"""Prompts and sentences are written and read back without loss."""

import random

import pytest

from llmalign.embedded import STYLES, compose, parse_prompt, prompts, read_sentence, split, split_sentences
from llmalign.embedded.grammar import Sentence
from llmalign.errors import UserError


def test_every_prompt_is_read_back_from_its_text() -> None:
    texts = [prompt.text for prompt in prompts()]
    assert len(texts) == len(set(texts)) == 4 * 12 * 10 * 3
    for prompt in prompts():
        assert parse_prompt(f"  {prompt.text}") == prompt


def test_a_text_that_is_no_prompt_is_refused() -> None:
    with pytest.raises(UserError, match="not a prompt of the embedded world"):
        parse_prompt("Recommend the moon to a school class.")


def test_held_out_combinations_are_seen_under_no_wording() -> None:
    train, held_out = split()
    assert (len(train), len(held_out)) == (1224, 216)
    seen = {(prompt.item, prompt.modifier) for prompt in train}
    assert not seen & {(prompt.item, prompt.modifier) for prompt in held_out}
    # Each item and each modifier is known by itself: only the combination is new.
    assert {prompt.item for prompt in held_out} <= {prompt.item for prompt in train}
    assert {prompt.modifier for prompt in held_out} <= {prompt.modifier for prompt in train}
    assert split(1) != split(0) == split()


@pytest.mark.parametrize(
    ("text", "meaning"),
    [
        ("Thank you for your message.", Sentence("courteous")),
        ("So much for that.", Sentence("plain")),
        ("Leave me in peace.", Sentence("rude")),
        ("It all depends.", Sentence("dodge")),
        ("I am asking the night porter for a better lock.", Sentence("main", "a better lock", "the night porter")),
        ("Many have tried the big exam.", Sentence("main", "the big exam")),
        (
            "A keen teenager can manage the big exam with some care for the simple reason that "
            "panic comes from surprises.",
            Sentence("main", "the big exam", "a keen teenager", "the big exam"),
        ),
        ("The attic is all right.", None),
        ("By the way, charts were pinned to the door.", Sentence("detail", "the observatory")),
        ("Everyone at the attic felt proud because the key snapped in half.",
         Sentence("main", "the attic", "proud", "a better lock")),
        ("So much for that", None),
        ("so much for that.", None),
        ("It all depends because the key snapped in half.", None),
        ("The big exam many tried have.", None),
    ],
)  # fmt: skip
def test_a_sentence_says_what_it_says(text: str, meaning: Sentence | None) -> None:
    assert read_sentence(text) == meaning


def test_what_follows_the_last_stop_is_a_sentence_too() -> None:
    assert split_sentences("One. Two.Three") == ["One.", "Two.", "Three"]
    assert split_sentences("  \n ") == []


@pytest.mark.parametrize("style", STYLES)
def test_written_answers_are_grammatical(style: str) -> None:
    rng = random.Random(style)
    for prompt in rng.choices(prompts(), k=200):
        for sentence in split_sentences(compose(prompt, rng, style)):
            assert read_sentence(sentence) is not None, sentence


def test_answers_vary() -> None:
    rng = random.Random(0)
    answers = [compose(prompt, rng) for prompt in prompts() for _ in range(2)]
    sentences = {sentence for answer in answers for sentence in split_sentences(answer)}
    assert len(set(answers)) > 0.9 * len(answers)
    assert len(sentences) > 2000
