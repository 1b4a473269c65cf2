"""Answers to prompts as AlpacaEval's model_outputs.json: drawn from a loaded model, or asked of an endpoint.

Both can be killed at any instant and go on. A loaded model's answers are written batch by batch beside the result; an
endpoint's are kept in the client's cache.
"""

import hashlib
import json
import logging
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm  # type: ignore[import-untyped]

from llmalign.errors import UserError
from llmalign.evaluation.annotations import Row, write_json, write_text
from llmalign.evaluation.prompts import Prompt, read_prompts
from llmalign.judges import Answer, ChatRequest, Failure, JudgeClient
from llmalign.scores.sampling import check_sampling, context_length, end_token_ids, memory_said, sample_groups

__all__ = ["ERROR", "Prompt", "Sampling", "generate_locally", "generate_remotely", "prompt_ids", "read_prompts"]

logger = logging.getLogger(__name__)

LEAST_SHARE = 0.75  # of the tokens that an answer could have by itself, where prompts nearly fill the context
PARTIAL = ".partial.jsonl"
ERROR = "error"  # in a row without an answer: why


@dataclass(frozen=True)
class Sampling:
    """How answers are drawn. `temperature` 0 is greedy; `raw` leaves the chat template out; `system` comes before.

    Raises UserError for settings that cannot be meant.
    """

    max_new_tokens: int = 2048
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    batch_size: int = 16
    system: str | None = None
    raw: bool = False

    def __post_init__(self) -> None:
        check_sampling(max_new_tokens=self.max_new_tokens, temperature=self.temperature, top_p=self.top_p)
        if self.batch_size < 1:
            raise UserError(f"batch_size is at least 1, not {self.batch_size}")
        if self.raw and self.system is not None:
            raise UserError("a system message needs the chat template, which raw leaves out: give one of the two")


def generate_locally(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    sampling: Sampling,
    *,
    generator: str,
    identity: str,
    out: Path | str,
    progress: bool = True,
) -> list[Row]:
    """Answer N prompts with a loaded model; the rows, which are written to `out` as model_outputs.json.

    Prompts are batched by length, the longest first. Every batch has a seed of its own and is kept in
    `out`.partial.jsonl once it is drawn: a killed call costs one batch, and the next ends with the same answers. What
    another `identity` of the model, other prompts or settings left there is not gone on with. A prompt that fills the
    model's context has an empty answer, one that nearly does a shorter one; both are said. Raises UserError for a
    conversation without a chat template, and where memory runs out. Not covered: two calls that
    write to one `out` at the same time.
    """
    out = Path(out)
    ids = prompt_ids(tokenizer, prompts, sampling)
    context = context_length(model.config)
    batches, overlong = _batches(ids, sampling, context)
    _say_lengths(batches, overlong, sampling, context)
    whole = json.dumps([identity, generator, ids, context, asdict(sampling)], sort_keys=True)
    kept = _Partial(out.with_name(out.name + PARTIAL), hashlib.sha256(whole.encode()).hexdigest(), len(batches))
    ends = set(end_token_ids(model, tokenizer))
    known = sum(len(batch.rows) for number, batch in enumerate(batches) if number in kept.batches)
    started, tokens = time.monotonic(), 0
    with tqdm(
        total=len(prompts), initial=known + len(overlong), desc="Generating", unit="answer", disable=not progress
    ) as bar:
        for number, batch in enumerate(batches):
            if number in kept.batches:
                continue
            drawn = _draw(model, tokenizer, [ids[row] for row in batch.rows], batch.limit, sampling, number)
            texts = [tokenizer.decode(own, skip_special_tokens=True) for own in drawn]
            kept.add(number, texts, sum(not own or own[-1] not in ends for own in drawn))
            tokens += sum(map(len, drawn))
            bar.set_postfix({"tokens/s": f"{tokens / (time.monotonic() - started):,.0f}"}, refresh=False)
            bar.update(len(drawn))
    seconds = time.monotonic() - started
    outputs = dict.fromkeys(range(len(prompts)), "")
    for number, batch in enumerate(batches):
        outputs.update(zip(batch.rows, kept.batches[number]["outputs"], strict=True))
    rows = [_row(prompt, outputs[place], generator) for place, prompt in enumerate(prompts)]
    write_json(out, rows)
    kept.remove()
    logger.info("%d tokens in %.1f s, %.0f a second.", tokens, seconds, tokens / max(seconds, 1e-9))
    _say_cut(sum(line["cut"] for line in kept.batches.values()), rows, len(overlong))
    return rows


def generate_remotely(
    client: JudgeClient,
    prompts: Sequence[Prompt],
    sampling: Sampling,
    *,
    generator: str,
    out: Path | str,
    progress: bool = True,
) -> tuple[list[Row], int]:
    """The same by a model behind an endpoint, which has the chat template; the rows, and how many have no answer.

    Answers are kept in the client's cache, those drawn at a temperature under a seed of their row. A row without an
    answer has an empty output and says why in `error`; the next call asks for it again. An answer without text, such
    as one that has used up its tokens in thought, is none. `top_p` goes through the client's `extra_body`. Raises
    UserError as the client does, and where no prompt has an answer.
    """
    if sampling.raw:
        raise UserError("an endpoint for chats puts the chat template on by itself: leave raw out")
    drawn = sampling.temperature > 0
    requests = [
        ChatRequest(
            prompt.messages(sampling.system), max_tokens=sampling.max_new_tokens, temperature=sampling.temperature,
            seed=sampling.seed + place if drawn else None, top_logprobs=None,
        )
        for place, prompt in enumerate(prompts)
    ]  # fmt: skip
    replies = _replies(client, requests, progress)
    rows = [
        {**_row(prompt, "", generator), ERROR: reply.message}
        if isinstance(reply, Failure)
        else _row(prompt, reply.text, generator)
        for prompt, reply in zip(prompts, replies, strict=True)
    ]
    reasons = [reply.message for reply in replies if isinstance(reply, Failure)]
    if len(reasons) == len(rows):
        raise UserError(f"none of {len(rows)} prompts has an answer; the first says: {reasons[0]}")
    write_json(out, rows)
    limit = sampling.max_new_tokens
    _say_cut(sum(not isinstance(reply, Failure) and reply.completion_tokens >= limit for reply in replies), rows, 0)
    if reasons:
        logger.warning("%d prompts have no answer, such as: %s; ask for them again.", len(reasons), reasons[0])
    return rows, len(reasons)


def _replies(client: JudgeClient, requests: Sequence[ChatRequest], progress: bool) -> list[Answer | Failure]:
    """Answers with a text, or why there is none; empty ones are not kept, and those that were kept are asked again."""
    replies = client.ask(requests, progress)
    known = [place for place, reply in enumerate(replies) if _is_empty(reply) and reply.cached]  # type: ignore[union-attr]
    if known:
        client.forget([requests[place] for place in known])
        for place, reply in zip(known, client.ask([requests[place] for place in known], progress), strict=True):
            replies[place] = reply
    empty = [place for place, reply in enumerate(replies) if _is_empty(reply)]
    client.forget([requests[place] for place in empty])
    for place in empty:
        used, limit = replies[place].completion_tokens, requests[place].max_tokens  # type: ignore[union-attr]
        more = f", and all {limit} tokens are used: give more with max_new_tokens" if used >= limit else ""
        replies[place] = Failure(f"the answer has no text{more}")
    return replies


def _is_empty(reply: Answer | Failure) -> bool:
    return isinstance(reply, Answer) and not reply.text.strip()


def prompt_ids(tokenizer: Any, prompts: Sequence[Prompt], sampling: Sampling) -> list[list[int]]:
    """Token ids of each prompt, up to where the answer begins: through the chat template where there is one.

    Without one, or under `raw`, a prompt is its text. Which it is, is logged. Raises UserError for a conversation of
    several messages, or a system message, without a template.
    """
    if tokenizer.chat_template is not None and not sampling.raw:
        logger.info("Prompts are put into the chat template (--raw leaves it out).")
        options = {"add_generation_prompt": True, "tokenize": True, "return_dict": True}
        chats = [prompt.messages(sampling.system) for prompt in prompts]
        return [list(tokenizer.apply_chat_template(chat, **options)["input_ids"]) for chat in chats]
    logger.info("Prompts are plain text%s.", "" if sampling.raw else ": the tokenizer has no chat template")
    if sampling.system is not None:
        raise UserError("a system message needs a chat template, and this model's tokenizer has none: leave it out")
    for number, prompt in enumerate(prompts, 1):
        if not isinstance(prompt.content, str) and len(prompt.content) > 1:
            raise UserError(
                f"prompt {number} is a conversation, which needs a chat template: give texts, or a model with one"
            )
    return [_plain(tokenizer, prompt.instruction) for prompt in prompts]


@dataclass(frozen=True)
class _Batch:
    """Rows that are drawn together, and how many tokens an answer of theirs may have."""

    rows: list[int]
    limit: int


def _batches(ids: list[list[int]], sampling: Sampling, context: int | None) -> tuple[list[_Batch], list[int]]:
    """Rows by length, and those whose prompt fills the context. Batches follow from prompts and settings alone."""

    def room(row: int) -> int:
        return sampling.max_new_tokens if context is None else min(sampling.max_new_tokens, context - len(ids[row]))

    order = sorted(range(len(ids)), key=lambda row: -len(ids[row]))
    batches: list[_Batch] = []
    for row in (row for row in order if room(row) > 0):
        last = batches[-1] if batches else None
        # The longest prompt of a batch decides how many tokens its answers have.
        if last is None or len(last.rows) == sampling.batch_size or last.limit < LEAST_SHARE * room(row):
            batches.append(_Batch([row], room(row)))
        else:
            last.rows.append(row)
    return batches, [row for row in order if room(row) <= 0]


def _draw(
    model: Any, tokenizer: Any, ids: list[list[int]], limit: int, sampling: Sampling, number: int
) -> list[list[int]]:
    seed = hashlib.blake2b(f"{sampling.seed}:{number}".encode(), digest_size=8).digest()
    with memory_said("lower batch_size or max_new_tokens"):
        groups = sample_groups(
            model, tokenizer, ids, samples=1, max_new_tokens=limit, temperature=sampling.temperature,
            top_p=sampling.top_p, seed=int.from_bytes(seed, "big") >> 1, batch_size=len(ids),
        )  # fmt: skip
    return [group[0] for group in groups]


class _Partial:
    """Batches that are drawn: a line that says of what, then one a batch; half a line, which a kill leaves, is none."""

    def __init__(self, path: Path, digest: str, count: int) -> None:
        self._path = path
        self.batches: dict[int, Row] = {}
        header, lines = {"of": digest}, self._lines()
        if lines and lines[0] == header:
            self.batches = {line["batch"]: line for line in lines[1:]}
            logger.info("%s holds %d of %d batches: going on.", path, len(self.batches), count)
        elif lines:
            logger.warning("%s is of another model, other prompts or settings: begun anew.", path)
        write_text(path, "".join(json.dumps(line) + "\n" for line in [header, *self.batches.values()]))

    def add(self, number: int, outputs: list[str], cut: int) -> None:
        """Write a batch down; `cut`: how many answers did not end by themselves."""
        self.batches[number] = {"batch": number, "outputs": outputs, "cut": cut}
        try:
            with open(self._path, "a", encoding="utf-8") as handle:
                handle.write(json.dumps(self.batches[number]) + "\n")
        except OSError as error:
            raise UserError(f"{self._path} cannot be written: {error.strerror or error}") from error

    def remove(self) -> None:
        """The result is written."""
        self._path.unlink(missing_ok=True)

    def _lines(self) -> list[Any]:
        try:
            text = self._path.read_text(encoding="utf-8")
        except FileNotFoundError:
            return []
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{self._path} cannot be read: {error}") from error
        found: list[Any] = []
        for line in text.split("\n")[:-1]:
            try:
                found.append(json.loads(line))
            except ValueError:
                break
        return found


def _plain(tokenizer: Any, text: str) -> list[int]:
    ids = list(tokenizer(text)["input_ids"])
    # Some tokenizers end every text, after which there is nothing to say.
    return ids[:-1] if len(ids) > 1 and ids[-1] == tokenizer.eos_token_id else ids


def _row(prompt: Prompt, output: str, generator: str) -> Row:
    dataset = {} if prompt.dataset is None else {"dataset": prompt.dataset}
    return {**dataset, "instruction": prompt.instruction, "output": output, "generator": generator}


def _say_lengths(batches: list[_Batch], overlong: list[int], sampling: Sampling, context: int | None) -> None:
    shortened = [len(batch.rows) for batch in batches if batch.limit < sampling.max_new_tokens]
    if shortened:
        logger.info(
            "%d answers may have at least %d tokens, but not %d: the model's context holds %d.",
            sum(shortened), min(batch.limit for batch in batches), sampling.max_new_tokens, context,
        )  # fmt: skip
    if overlong:
        logger.warning(
            "%d prompts fill the model's context of %d tokens and have empty answers, such as prompt %d.",
            len(overlong), context, min(overlong) + 1,
        )  # fmt: skip


def _say_cut(cut: int, rows: list[Row], overlong: int) -> None:
    if cut:
        logger.warning("%d of %d answers did not end by themselves: they were cut at their limit.", cut, len(rows))
    empty = sum(not row["output"].strip() and ERROR not in row for row in rows) - overlong
    if empty:
        logger.warning("%d of %d answers are empty.", empty, len(rows))
