"""A real server, llama.cpp on the loopback: log-probs as the model has them, and its death in the middle."""

import json
import math
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from llmalign.errors import UserError
from llmalign.judges import Answer, Failure, JudgeClient, PairwiseJudge
from llmalign.judges.cache import AnswerCache
from llmalign.judges.chat import Completion
from llmalign.judges.endpoint import Again
from tests.judges.scripted import Reply, ScriptedJudge, ask_for
from tests.judges.serving import LlamaServer

Clients = Callable[..., JudgeClient]
VOCABULARY = 512
SHORT = "{prompt} One said: {first} Two said: {second} The best was"


@pytest.fixture(scope="module")
def server(gguf_model: Path) -> Iterator[LlamaServer]:
    running = LlamaServer(gguf_model)
    yield running
    running.kill()


@pytest.fixture(scope="module")
def next_token(shared: Path) -> Callable[[str], tuple[int, dict[str, float]]]:
    """What transformers says of a prompt: its tokens, and the log-probs of the next one by its text."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = shared / "models" / "stories260K"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    pieces = tokenizer.convert_ids_to_tokens(range(VOCABULARY))

    def predict(text: str) -> tuple[int, dict[str, float]]:
        ids = tokenizer(text + "\n", return_tensors="pt").input_ids
        with torch.no_grad():
            logprobs = model(ids).logits[0, -1].log_softmax(-1).tolist()
        named = {piece.replace("▁", " "): logprob for piece, logprob in zip(pieces, logprobs, strict=True)}
        return ids.shape[1], {piece: logprob for piece, logprob in named.items() if not piece.startswith("<")}

    return predict


def test_log_probs_of_the_first_token(server: LlamaServer, client: Clients) -> None:
    """Of the whole vocabulary: they sum to one, and the likeliest token is the answer."""
    (answer,) = client(base_url=f"{server.url}/v1").ask(ask_for("Once upon a time", top_logprobs=VOCABULARY))
    assert isinstance(answer, Answer) and answer.first_token_logprobs is not None
    assert sum(map(math.exp, answer.first_token_logprobs.values())) == pytest.approx(1.0, abs=1e-3)
    likeliest = max(answer.first_token_logprobs, key=answer.first_token_logprobs.__getitem__)
    assert likeliest.strip() == answer.text.strip() and answer.prompt_tokens > 4


@pytest.mark.slow
def test_log_probs_are_the_models(
    server: LlamaServer, client: Clients, next_token: Callable[[str], tuple[int, dict[str, float]]]
) -> None:
    texts = ["Once upon a time, there was a", "Lily and Tom went to the park. They", "The end."]
    answers = client(base_url=f"{server.url}/v1").ask(ask_for(*texts, top_logprobs=VOCABULARY))
    for text, answer in zip(texts, answers, strict=True):
        assert isinstance(answer, Answer) and answer.first_token_logprobs is not None
        length, expected = next_token(text)
        assert (answer.prompt_tokens, answer.completion_tokens) == (length, 1)
        likely = {token: logprob for token, logprob in expected.items() if logprob > -15}
        assert len(likely) > 50
        for token, logprob in likely.items():
            assert answer.first_token_logprobs[token] == pytest.approx(logprob, abs=1e-3), token
        assert answer.text == max(expected, key=expected.__getitem__).lstrip()


@pytest.mark.slow
def test_a_preference_is_the_models(
    server: LlamaServer, client: Clients, next_token: Callable[[str], tuple[int, dict[str, float]]]
) -> None:
    scorer = PairwiseJudge(
        client(base_url=f"{server.url}/v1"),
        answers="logprobs", both_orders=True, template=SHORT, letters=("T", "H"), top_logprobs=20,
    )  # fmt: skip
    (score,) = scorer.score(["Lily asked."], ["Yes!"], ["No."])
    logits = []
    for first, second in (("Yes!", "No."), ("No.", "Yes!")):
        _, logprobs = next_token(SHORT.format(prompt="Lily asked.", first=first, second=second))
        letters = [
            math.log(sum(math.exp(lp) for token, lp in logprobs.items() if token.strip() == letter)) for letter in "TH"
        ]
        logits.append(letters[0] - letters[1])
    first_beats, second_beats = (1 / (1 + math.exp(-logit)) for logit in logits)
    assert score == pytest.approx((first_beats + 1 - second_beats) / 2, abs=1e-4)


def test_a_prompt_above_the_context_costs_its_row_alone(server: LlamaServer, client: Clients) -> None:
    long, short = client(base_url=f"{server.url}/v1").ask(ask_for("word " * 5000, "word"))
    assert isinstance(long, Failure) and "HTTP 400" in long.message and "context size" in long.message
    assert isinstance(short, Answer)


def test_a_server_without_log_probs_is_found_out(
    server: LlamaServer, judge: ScriptedJudge, client: Clients, tmp_path: Path
) -> None:
    """Before the real one stands a proxy that loses them; as text its answers can be read."""
    judge.answer = lambda body, times: Reply(without_logprobs(forwarded(server.url, body)))
    rows = (["Lily asked."] * 5, ["Yes!", "Yes.", "Sure.", "I will.", "Good."], ["No."] * 5)
    with pytest.raises(UserError, match="returns no log-probs.*answers: text"):
        PairwiseJudge(client(), answers="logprobs").score(*rows)
    assert len(judge.bodies) == 1
    text = PairwiseJudge(client(), answers="text", template=SHORT, letters=('"', "'"), max_tokens=1)
    assert set(text.score(*rows)) <= {0.0, 1.0} and text.failed == 0


def test_killed_and_started_again_in_the_middle(
    gguf_model: Path, client: Clients, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """200 rows, no row lost; answers that may have been paid for twice are at most those that were in flight."""
    concurrency, cache = 4, tmp_path / "answers.sqlite"
    server = LlamaServer(gguf_model)
    asker = client(base_url=f"{server.url}/v1", concurrency=concurrency, patience=60.0, cache=cache)
    options = {"answers": "logprobs", "template": SHORT, "letters": ("T", "H"), "top_logprobs": 20}
    scorer = PairwiseJudge(asker, **options)
    prompts = [f"Tom has {number} cats." for number in range(200)]
    rows = (prompts, ["He is glad."] * 200, ["He is sad and runs home."] * 200)
    outcomes: list[object] = []
    post = asker._endpoint.post
    monkeypatch.setattr(asker._endpoint, "post", lambda body: outcomes.append(post(body)) or outcomes[-1])
    scores: list[float] = []
    running = threading.Thread(target=lambda: scores.extend(scorer.score(*rows)))
    running.start()
    watched = AnswerCache(cache)
    while watched.spent("default")[0] < 70:
        time.sleep(0.002)
    server.kill()
    again = LlamaServer(gguf_model, server.port)
    running.join(120)
    again.kill()
    assert len(scores) == 200 and not any(map(math.isnan, scores)) and scorer.failed == 0
    assert (asker.asked, asker.failed) == (200, 0)
    assert sum(isinstance(outcome, Completion) for outcome in outcomes) == 200
    troubles = [outcome for outcome in outcomes if isinstance(outcome, Again)]
    cut = [trouble for trouble in troubles if trouble.sent and not trouble.reason.startswith("HTTP 503: Loading")]
    assert troubles and len(cut) <= concurrency
    assert asker.spent[0] == asker.sent == 200 + sum(trouble.sent for trouble in troubles)
    # The judge is gone for good, and every answer is there.
    resumed = PairwiseJudge(client(base_url=f"{server.url}/v1", cache=cache, patience=0.0), **options)
    assert resumed.score(*rows) == scores


def test_a_proxy_that_is_busy_and_breaks_loses_nothing(
    server: LlamaServer, judge: ScriptedJudge, client: Clients
) -> None:
    """Every third question meets 429 and every fifth 500 before the real server sees it."""

    def busy(body: dict, times: int) -> Reply:
        number = int(body["messages"][-1]["content"].split()[2])
        if not times and number % 3 == 0:
            return Reply({}, status=429, headers={"Retry-After": "0"})
        if not times and number % 5 == 0:
            return Reply({}, status=500)
        return Reply(forwarded(server.url, body))

    judge.answer = busy
    asker = client()
    answers = asker.ask(ask_for(*(f"Tom has {number} cats." for number in range(60))))
    assert all(isinstance(answer, Answer) for answer in answers)
    assert asker.sent == 60 + 28 == len(judge.bodies)


def without_logprobs(answer: dict) -> dict:
    """The answer of a server that says nothing of log-probs."""
    return {**answer, "choices": [{**choice, "logprobs": None} for choice in answer["choices"]]}


def forwarded(url: str, body: dict) -> dict:
    """What the real server answers."""
    request = urllib.request.Request(
        f"{url}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=60) as answer:
        return json.load(answer)
