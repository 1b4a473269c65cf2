"""The judge that a command line names, for the commands that judge."""

import argparse
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmalign.errors import UserError

AT_A_TIME = 64  # rows that a local judge reads before they are written
ONE_OF = ("judge", "reward_model", "preference_model", "function")
# What an option is where it is not given; and which judges read it: those that are not here are for an endpoint.
DEFAULTS: dict[str, Any] = {
    "url": None, "answers": "logprobs", "both_orders": False, "order_seed": 0, "template": None, "letters": ["A", "B"],
    "top_logprobs": 5, "api_key_env": None, "concurrency": 8, "max_requests": None, "max_tokens": None,
    "patience": 300.0, "cache": None,
}  # fmt: skip
ALSO_READ_BY = {"both_orders": ("function",)}


@dataclass(frozen=True)
class Judge:
    """What judges, under the name that annotations carry.

    `about` says what it is, `at_a_time` how often to write, `reasons` why rows of its last call have no result.
    """

    oracle: Any
    annotator: str
    about: dict[str, Any]
    at_a_time: int | None
    close: Callable[[], None]
    reasons: Callable[[], Sequence[str | None]]


class _Local:
    """A judge on this machine, and why rows of its last call have no result."""

    def __init__(self, ask: Callable[..., list[float]], who: str) -> None:
        self._ask, self._who = ask, who
        self.reasons: list[str | None] = []

    def preferences(self, prompts: Sequence[str], first: Sequence[str], second: Sequence[str]) -> list[float]:
        """P(first beats second) of each pair."""
        found = self._ask(prompts, first, second)
        self.reasons = [f"{self._who} gave no number" if math.isnan(p) else None for p in found]
        return found

    def judge(self, annotator: str, about: dict[str, Any], close: Callable[[], None] = lambda: None) -> Judge:
        """It, as commands take it."""
        return Judge(self, annotator, about, AT_A_TIME, close, lambda: self.reasons)


def add_judge_arguments(command: argparse.ArgumentParser) -> None:
    """The options that name a judge and say how it is asked."""
    kind = command.add_argument_group("the judge, one of")
    kind.add_argument("--judge", metavar="MODEL", help="a model behind an OpenAI-compatible endpoint, at --url")
    kind.add_argument("--reward_model", metavar="PATH", help="a local reward model: the higher reward wins")
    kind.add_argument("--preference_model", metavar="PATH", help="a local pair-preference model")
    kind.add_argument("--function", metavar="NAME", help="file.py:function(prompts, first, second) -> P(first wins)")
    asked = command.add_argument_group("how an endpoint is asked")
    asked.add_argument("--url", metavar="URL", help="of the endpoint; it usually ends in /v1")
    asked.add_argument("--answers", choices=("logprobs", "text"), help="how it is read (logprobs)")
    asked.add_argument("--both_orders", action="store_true", default=None, help="show both orders and take the mean")
    asked.add_argument("--order_seed", type=int, metavar="N", help="of AlpacaEval's rule for the order (0)")
    asked.add_argument("--template", metavar="FILE", help="the question: {prompt}, {first}, {second}, {boundary}")
    asked.add_argument("--letters", nargs=2, metavar="X", help="what it answers with (A B)")
    asked.add_argument("--top_logprobs", type=int, metavar="N", help="likeliest first tokens (5)")
    asked.add_argument("--api_key_env", metavar="NAME", help="variable that holds the key (OPENAI_API_KEY; none: '')")
    asked.add_argument("--concurrency", type=int, metavar="N", help="requests at once (8)")
    asked.add_argument("--max_requests", type=int, metavar="N", help="budget, over all runs with this cache")
    asked.add_argument("--max_tokens", type=int, metavar="N", help="the same in tokens")
    asked.add_argument("--patience", type=float, metavar="S", help="seconds of silence to sit out (300)")
    asked.add_argument("--cache", metavar="FILE", help="its answers (judge-answers.sqlite beside the result)")


def judge_of(options: argparse.Namespace, folder: Path) -> Judge:
    """The judge, loaded; an endpoint's answers are kept in `folder` unless --cache names another place.

    Raises UserError where none or several are named, where one cannot be had, and for options that it does not read.
    """
    named = [name for name in ONE_OF if vars(options)[name]]
    if len(named) != 1:
        raise UserError(
            f"name one judge: {', '.join('--' + name for name in ONE_OF)}" + (f"; here are {len(named)}" * bool(named))
        )
    _refuse_unread(options, named[0])
    options = argparse.Namespace(**(vars(options) | filled(options, DEFAULTS)))
    if named[0] == "judge":
        return _endpoint(options, folder)
    if named[0] == "function":
        return _function(options)
    return _reward_model(options.reward_model) if options.reward_model else _pair_model(options.preference_model)


def given(options: argparse.Namespace, names: Iterable[str]) -> str:
    """Those of the options that the command line has, as they are written there."""
    found = vars(options)
    return ", ".join(f"--{name}" for name in names if found[name] is not None and found[name] is not False)


def filled(options: argparse.Namespace, defaults: Mapping[str, Any]) -> dict[str, Any]:
    """The values of options, with `defaults` for those that are not given."""
    found = vars(options)
    return {name: value if found[name] is None else found[name] for name, value in defaults.items()}


def _refuse_unread(options: argparse.Namespace, kind: str) -> None:
    if kind != "judge":
        unread = given(options, [name for name in DEFAULTS if kind not in ALSO_READ_BY.get(name, ())])
        if unread:
            raise UserError(f"--{kind} does not read {unread}: leave it out, or name a model at an endpoint as --judge")
    elif options.answers == "text" and options.top_logprobs is not None:
        raise UserError("--top_logprobs is not read with --answers text: leave one of the two out")
    elif options.both_orders and options.order_seed is not None:
        raise UserError("--order_seed is not read with --both_orders: leave one of the two out")


def key_variable(options: argparse.Namespace) -> str | None:
    """The environment variable that holds the key; None for no key."""
    return "OPENAI_API_KEY" if options.api_key_env is None else options.api_key_env or None


def _endpoint(options: argparse.Namespace, folder: Path) -> Judge:
    from llmalign.evaluation.annotate import settings_name
    from llmalign.judges import DEFAULT_TEMPLATE, JudgeClient, PairwiseJudge
    from llmalign.rewards.preference import JudgeOracle

    if not options.url:
        raise UserError("--judge names a model behind an endpoint: say where with --url, such as http://host:8000/v1")
    template = _text(options.template) if options.template else DEFAULT_TEMPLATE
    cache = Path(options.cache) if options.cache else folder / "judge-answers.sqlite"
    client = JudgeClient(
        options.judge, options.url, cache=cache, api_key_env=key_variable(options), concurrency=options.concurrency,
        patience=options.patience, max_requests=options.max_requests, max_tokens=options.max_tokens,
    )  # fmt: skip
    judge = PairwiseJudge(
        client, answers=options.answers, both_orders=options.both_orders, template=template,
        letters=(options.letters[0], options.letters[1]), order_seed=options.order_seed,
        top_logprobs=options.top_logprobs, progress=True,
    )  # fmt: skip
    client.check()
    settings: tuple[Any, ...] = (template, options.answers, options.both_orders, options.order_seed, options.letters)
    settings += (options.url, options.top_logprobs if options.answers == "logprobs" else None)
    about = {"kind": "endpoint", "name": options.judge, "answers": options.answers, "both_orders": options.both_orders}
    return Judge(
        JudgeOracle(judge),
        settings_name(options.judge, *settings),
        about,
        None,
        lambda: _say_spent(client),
        lambda: judge.reasons,
    )


def _say_spent(client: Any) -> None:
    import logging

    logging.getLogger(__name__).info(
        "The judge was asked %d times (%d tokens); %d answers were known.", client.sent, client.tokens, client.found
    )
    client.close()


def _function(options: argparse.Namespace) -> Judge:
    from llmalign.evaluation.annotate import settings_name
    from llmalign.rewards.functions import load_function, source_digest
    from llmalign.rewards.preference import FunctionOracle

    function = load_function(options.function)
    oracle = FunctionOracle(function, options.function, both_orders=options.both_orders)
    settings = (options.function, source_digest(function), options.both_orders)
    name = settings_name(options.function.rsplit(":", 1)[-1], *settings)
    about = {"kind": "function", "name": options.function, "both_orders": options.both_orders}
    return _Local(oracle.preferences, "the function").judge(name, about, oracle.close)


def _reward_model(path: str) -> Judge:
    from llmalign.evaluation.annotate import settings_name
    from llmalign.inference import model_identity
    from llmalign.rewards.model import load_reward_model
    from llmalign.rewards.preference import by_reward

    model = load_reward_model(path)

    def rewarded(prompts: Sequence[str], first: Sequence[str], second: Sequence[str]) -> list[float]:
        chats, answers = _as_the_model_reads(model.tokenizer, [*prompts, *prompts], [*first, *second])
        rewards = model(prompts=chats, completions=answers)
        return [by_reward(one, other) for one, other in zip(rewards[: len(first)], rewards[len(first) :], strict=True)]

    name = Path(path).resolve().name
    about = {"kind": "reward_model", "name": name}
    return _Local(rewarded, "the reward model").judge(settings_name(name, model_identity(path)), about)


def _pair_model(path: str) -> Judge:
    from llmalign.evaluation.annotate import settings_name
    from llmalign.inference import model_identity
    from llmalign.rewards.pair_model import load_preference_model

    model = load_preference_model(path)

    def compared(prompts: Sequence[str], first: Sequence[str], second: Sequence[str]) -> list[float]:
        chats, answers = _as_the_model_reads(model.tokenizer, prompts, first)
        return model.score(chats, answers, _as_the_model_reads(model.tokenizer, prompts, second)[1])

    name = Path(path).resolve().name
    about = {"kind": "preference_model", "name": name}
    return _Local(compared, "the preference model").judge(settings_name(name, model_identity(path)), about)


def _as_the_model_reads(tokenizer: Any, prompts: Sequence[str], answers: Sequence[str]) -> tuple[list[Any], list[Any]]:
    """Texts as conversations where the model has a chat template."""
    if tokenizer.chat_template is None:
        return list(prompts), list(answers)
    chats = [[{"role": "user", "content": prompt}] for prompt in prompts]
    return chats, [[{"role": "assistant", "content": answer}] for answer in answers]


def _text(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"the template {path} cannot be read: {error}") from error
