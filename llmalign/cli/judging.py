"""The judge that a command line names, for the commands that judge."""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmalign.errors import UserError

AT_A_TIME = 64  # rows that a local judge reads before they are written
ONE_OF = ("judge", "reward_model", "preference_model", "function")


@dataclass(frozen=True)
class Judge:
    """What judges, under the name that annotations carry.

    `about` says what it is, `at_a_time` how often to write, `reasons` why rows of its last call failed.
    """

    oracle: Any
    annotator: str
    about: dict[str, Any]
    at_a_time: int | None
    close: Callable[[], None]
    reasons: Callable[[], Sequence[str | None]] | None = None


def add_judge_arguments(command: argparse.ArgumentParser) -> None:
    """The options that name a judge and say how it is asked."""
    kind = command.add_argument_group("the judge, one of")
    kind.add_argument("--judge", metavar="MODEL", help="a model behind an OpenAI-compatible endpoint, at --url")
    kind.add_argument("--reward_model", metavar="PATH", help="a local reward model: the higher reward wins")
    kind.add_argument("--preference_model", metavar="PATH", help="a local pair-preference model")
    kind.add_argument("--function", metavar="NAME", help="file.py:function(prompts, first, second) -> P(first wins)")
    asked = command.add_argument_group("how an endpoint is asked")
    asked.add_argument("--url", metavar="URL", help="of the endpoint; it usually ends in /v1")
    asked.add_argument("--answers", choices=("logprobs", "text"), default="logprobs", help="how it is read (logprobs)")
    asked.add_argument("--both_orders", action="store_true", help="show both orders and take the mean")
    asked.add_argument("--order_seed", type=int, default=0, metavar="N", help="of AlpacaEval's rule for the order (0)")
    asked.add_argument("--template", metavar="FILE", help="the question: {prompt}, {first}, {second}, {boundary}")
    asked.add_argument("--letters", nargs=2, default=["A", "B"], metavar="X", help="what it answers with (A B)")
    asked.add_argument("--top_logprobs", type=int, default=5, metavar="N", help="likeliest first tokens (5)")
    asked.add_argument("--api_key_env", metavar="NAME", help="variable that holds the key (OPENAI_API_KEY; none: '')")
    asked.add_argument("--concurrency", type=int, default=8, metavar="N", help="requests at once (8)")
    asked.add_argument("--max_requests", type=int, metavar="N", help="budget, over all runs with this cache")
    asked.add_argument("--max_tokens", type=int, metavar="N", help="the same in tokens")
    asked.add_argument("--patience", type=float, default=300.0, metavar="S", help="seconds of silence to sit out (300)")
    asked.add_argument("--cache", metavar="FILE", help="its answers (judge-answers.sqlite beside the result)")


def judge_of(options: argparse.Namespace, folder: Path) -> Judge:
    """The judge, loaded; an endpoint's answers are kept in `folder` unless --cache names another place.

    Raises UserError where none or several are named, and where one cannot be had.
    """
    named = [name for name in ONE_OF if vars(options)[name]]
    if len(named) != 1:
        raise UserError(
            f"name one judge: {', '.join('--' + name for name in ONE_OF)}" + (f"; here are {len(named)}" * bool(named))
        )
    if named[0] == "judge":
        return _endpoint(options, folder)
    if options.url:
        raise UserError(f"--url belongs to --judge, not to --{named[0]}")
    if named[0] == "function":
        return _function(options)
    return _reward_model(options.reward_model) if options.reward_model else _pair_model(options.preference_model)


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
    return Judge(oracle, name, about, AT_A_TIME, oracle.close)


def _reward_model(path: str) -> Judge:
    from llmalign.evaluation.annotate import settings_name
    from llmalign.inference import model_identity
    from llmalign.rewards.model import load_reward_model
    from llmalign.rewards.preference import by_reward

    model = load_reward_model(path)

    class Rewarded:
        """The answer of the higher reward wins."""

        def preferences(self, prompts: Sequence[str], first: Sequence[str], second: Sequence[str]) -> list[float]:
            chats, answers = _as_the_model_reads(model.tokenizer, [*prompts, *prompts], [*first, *second])
            rewards = model(prompts=chats, completions=answers)
            return [
                by_reward(one, other) for one, other in zip(rewards[: len(first)], rewards[len(first) :], strict=True)
            ]

    name = Path(path).resolve().name
    about = {"kind": "reward_model", "name": name}
    return Judge(Rewarded(), settings_name(name, model_identity(path)), about, AT_A_TIME, lambda: None)


def _pair_model(path: str) -> Judge:
    from llmalign.evaluation.annotate import settings_name
    from llmalign.inference import model_identity
    from llmalign.rewards.pair_model import load_preference_model

    model = load_preference_model(path)

    class Compared:
        """As the pair-preference model says."""

        def preferences(self, prompts: Sequence[str], first: Sequence[str], second: Sequence[str]) -> list[float]:
            chats, answers = _as_the_model_reads(model.tokenizer, prompts, first)
            return model.score(chats, answers, _as_the_model_reads(model.tokenizer, prompts, second)[1])

    name = Path(path).resolve().name
    about = {"kind": "preference_model", "name": name}
    return Judge(Compared(), settings_name(name, model_identity(path)), about, AT_A_TIME, lambda: None)


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
