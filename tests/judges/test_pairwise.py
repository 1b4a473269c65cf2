"""P(first beats second) as a judge says it, in one order or both."""

import logging
import math
from collections.abc import Callable

import pytest

from llmalign.errors import UserError
from llmalign.judges import BudgetSpent, JudgeClient, PairwiseJudge, is_switched
from tests.judges.scripted import Reply, ScriptedJudge, completion, question

Clients = Callable[..., JudgeClient]
SHORT = "{prompt}|{first}|{second}"
PROMPTS = [f"prompt {number}" for number in range(8)]


def in_favour(p: float, *, text: str | None = None) -> Reply:
    """An answer that gives the letter A the probability p, half of the mass being on other tokens."""
    likely = {" A": math.log(p / 2), "B": math.log((1 - p) / 2), "The": math.log(0.3)}
    return Reply(completion(text if text is not None else ("A" if p > 0.5 else "B"), likely))


def prefers_longer(body: dict, times: int) -> Reply:
    """With a leaning to the first place: .8 when the longer stands there, .4 when it stands second."""
    _, first, second = question(body).split("|")
    return in_favour(0.8 if len(first) > len(second) else 0.4)


def test_one_order_by_alpaca_evals_rule(judge: ScriptedJudge, client: Clients) -> None:
    judge.answer = prefers_longer
    scorer = PairwiseJudge(client(), answers="logprobs", template=SHORT)
    scores = scorer.score(PROMPTS, ["longer"] * 8, ["short"] * 8)
    turned = [is_switched(prompt) for prompt in PROMPTS]
    assert 0 < sum(turned) < 8
    assert scores == pytest.approx([0.6 if swap else 0.8 for swap in turned])
    shown = {f"{p}|short|longer" if swap else f"{p}|longer|short" for p, swap in zip(PROMPTS, turned, strict=True)}
    assert set(judge.questions) == shown and len(judge.questions) == 8


def test_the_orders_seed_changes_the_order(judge: ScriptedJudge, client: Clients) -> None:
    PairwiseJudge(client(), answers="logprobs", template=SHORT, order_seed=3).score(PROMPTS, ["x"] * 8, ["y"] * 8)
    turned = {text.split("|")[0]: text.endswith("x") for text in judge.questions}
    assert turned == {prompt: is_switched(prompt, 3) for prompt in PROMPTS}
    assert turned != {prompt: is_switched(prompt, 0) for prompt in PROMPTS}


def test_both_orders_are_averaged(judge: ScriptedJudge, client: Clients) -> None:
    """.8 for the longer in the first place, .6 in the second: .7, and .3 for the shorter, from the same answers."""
    judge.answer = prefers_longer
    scorer = PairwiseJudge(client(), answers="logprobs", both_orders=True, template=SHORT)
    assert scorer.score(["p"], ["longer"], ["short"]) == pytest.approx([0.7])
    assert scorer.score(["p"], ["short"], ["longer"]) == pytest.approx([0.3])
    assert sorted(judge.questions) == ["p|longer|short", "p|short|longer"]


def test_text_answers(judge: ScriptedJudge, client: Clients) -> None:
    texts = {"p|x|y": "Answer: A", "p|y|x": "Answer: A", "q|x|y": "A", "q|y|x": "B", "r|x|y": "neither", "r|y|x": "A"}
    judge.answer = lambda body, times: Reply(completion(texts[question(body)]))
    scorer = PairwiseJudge(client(), answers="text", both_orders=True, template=SHORT)
    scores = scorer.score(["p", "q", "r"], ["x"] * 3, ["y"] * 3)
    assert scores[:2] == [0.5, 1.0] and math.isnan(scores[2])
    assert scorer.failed == 1
    assert {(body["max_tokens"], body.get("logprobs")) for body in judge.bodies} == {(16, None)}


def test_identical_answers_cost_nothing(judge: ScriptedJudge, client: Clients) -> None:
    message = [{"role": "assistant", "content": "same"}]
    scorer = PairwiseJudge(client(max_requests=0), answers="logprobs", both_orders=True)
    assert scorer.score(["p", "p"], ["same", message], ["same", "same"]) == [0.5, 0.5]
    assert not judge.bodies and scorer.failed == 0


def test_conversations(judge: ScriptedJudge, client: Clients) -> None:
    prompt = [{"role": "system", "content": "be kind"}, {"role": "user", "content": "hello"}]
    scorer = PairwiseJudge(client(), answers="logprobs", both_orders=True, template=SHORT)
    scorer.score([prompt], [[{"role": "assistant", "content": "hi"}]], ["go away"])
    assert "system: be kind\nuser: hello|hi|go away" in judge.questions


def test_a_row_that_fails_is_nan_counted_and_said_once_a_kind(
    judge: ScriptedJudge, client: Clients, caplog: pytest.LogCaptureFixture
) -> None:
    def answer(body: dict, times: int) -> Reply:
        prompt, first, second = question(body).split("|")
        if prompt.startswith("long"):
            return Reply({"error": {"message": f"{len(prompt)} tokens exceed the context"}}, status=400)
        if prompt.startswith("odd"):
            return Reply(completion("The", {"The": -0.1, "An": -3.0}))
        return in_favour(0.75)

    judge.answer = answer
    scorer = PairwiseJudge(client(), answers="logprobs", both_orders=True, template=SHORT)
    with caplog.at_level(logging.WARNING):
        scores = scorer.score(["ok", "long", "long long", "odd", "odd one", "ok too"], ["x"] * 6, ["y"] * 6)
    assert [math.isnan(score) for score in scores] == [False, True, True, True, True, False]
    assert scorer.failed == 4
    said = [record.getMessage() for record in caplog.records if record.name.startswith("llmalign")]
    assert len(said) == 2
    assert "HTTP 400: 4 tokens exceed the context" in said[0]
    assert "neither of A and B is among the likeliest first tokens" in said[1]


def test_one_order_that_fails_fails_the_row(judge: ScriptedJudge, client: Clients) -> None:
    judge.answer = lambda body, times: (
        in_favour(0.9) if question(body) == "p|x|y" else Reply(completion("The", {"The": -0.1}))
    )
    scorer = PairwiseJudge(client(), answers="logprobs", both_orders=True, template=SHORT)
    assert math.isnan(scorer.score(["p"], ["x"], ["y"])[0]) and scorer.failed == 1


def test_letters_and_template_of_ones_own(judge: ScriptedJudge, client: Clients) -> None:
    judge.answer = lambda body, times: Reply(completion("m", {"m": math.log(0.2), "M": math.log(0.6), "A": -0.1}))
    scorer = PairwiseJudge(client(), answers="logprobs", both_orders=True, template=SHORT, letters=("m", "M"))
    assert scorer.score(["p"], ["x"], ["y"]) == pytest.approx([0.5])
    single = PairwiseJudge(client(), answers="logprobs", template=SHORT, letters=("m", "M"))
    prompt = next(text for text in PROMPTS if not is_switched(text))
    assert single.score([prompt], ["x"], ["y"]) == pytest.approx([0.25])


def test_the_default_question_holds_the_texts_and_asks_for_a_letter(judge: ScriptedJudge, client: Clients) -> None:
    PairwiseJudge(client(), answers="logprobs", both_orders=True).score(["the request"], ["one"], ["two"])
    (first,) = [text for text in judge.questions if text.index("\none\n") < text.index("\ntwo\n")]
    assert "\nthe request\n" in first and first.endswith("Reply with one letter, A or B, and nothing else.")


def test_a_budget_that_ends_goes_on_where_it_was(judge: ScriptedJudge, client: Clients) -> None:
    judge.answer = prefers_longer
    options = {"answers": "logprobs", "both_orders": True, "template": SHORT}
    rows = (PROMPTS, ["longer"] * 8, ["short"] * 8)
    with pytest.raises(BudgetSpent, match="10 of 16"):
        PairwiseJudge(client(max_requests=10), **options).score(*rows)
    assert PairwiseJudge(client(max_requests=16), **options).score(*rows) == pytest.approx([0.7] * 8)
    assert set(judge.counts.values()) == {1}


@pytest.mark.parametrize(
    "options, said",
    [
        ({"answers": "words"}, "logprobs or as text"),
        ({"answers": "text", "letters": ("A", "A")}, "two different letters"),
        ({"answers": "text", "letters": (" A", "B")}, "two different letters"),
        ({"answers": "text", "letters": ("", "B")}, "two different letters"),
        ({"answers": "logprobs", "top_logprobs": 1}, "top_logprobs of at least 2"),
        ({"answers": "text", "template": "{prompt}"}, "lacks"),
    ],
)
def test_settings_that_cannot_be_meant(client: Clients, options: dict, said: str) -> None:
    with pytest.raises(UserError, match=said):
        PairwiseJudge(client(), **options)


def test_answers_that_do_not_match_their_prompts(client: Clients) -> None:
    with pytest.raises(UserError, match="2 prompts need as many answers, got 1 and 2"):
        PairwiseJudge(client(), answers="text").score(["a", "b"], ["x"], ["x", "y"])


def test_an_answer_that_cannot_be_read_is_asked_for_again(judge: ScriptedJudge, client: Clients) -> None:
    """It is paid for, and not kept: the next call asks, and what is read then is kept."""
    judge.answer = lambda body, times: Reply(completion("hm" if times < 2 else "A"))
    for call, (expected, asked) in enumerate([(math.nan, 1), (math.nan, 2), (1.0, 3), (1.0, 3)]):
        scorer = PairwiseJudge(client(), answers="text", template=SHORT)
        score = scorer.score(["q"], ["x"], ["y"])[0]
        turned = is_switched("q")
        assert score == pytest.approx(1 - expected if turned else expected, nan_ok=True), call
        assert len(judge.questions) == asked


def test_an_unread_answer_that_a_killed_run_left_is_asked_for_again(judge: ScriptedJudge, client: Clients) -> None:
    judge.answer = lambda body, times: Reply(completion("hm" if times < 1 else "B"))
    scorer = PairwiseJudge(client(), answers="text", template=SHORT, both_orders=False)
    request = scorer._request("q", "x", "y", is_switched("q"))
    scorer.client.ask([request])
    assert scorer.score(["q"], ["x"], ["y"]) == [1.0 if is_switched("q") else 0.0]
    assert len(judge.questions) == 2
