"""Answers to prompts as AlpacaEval's model_outputs.json: sampled by a model that is loaded, or asked of an endpoint.

Both can be killed at any instant and go on. A loaded model's answers are written batch by batch beside the result; an
endpoint's are kept in the client's cache.
"""

import hashlib
import json
import logging
import math
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm  # type: ignore[import-untyped]

from llmalign.errors import UserError
from llmalign.evaluation.annotations import read_outputs, write_json
from llmalign.evaluation.prompts import Prompt
from llmalign.judges import ChatRequest, Failure, JudgeClient
from llmalign.scores.sampling import end_token_ids, sample_groups

logger = logging.getLogger(__name__)

LEAST_SHARE = 0.75  # of the tokens that an answer could have alone, where its batch shares the context's last ones
PARTIAL = ".partial.jsonl"
ERROR = "error"

Row = dict[str, Any]


@dataclass(frozen=True)
class Drawing:
    """How answers are drawn. `temperature` 0 is greedy; `raw` leaves the chat template out; `system` comes before.

    Raises UserError for numbers that cannot be meant.
    """

    max_new_tokens: int = 2048
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    system: str | None = None
    raw: bool = False
    batch_size: int = 8

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1 or self.batch_size < 1:
            raise UserError("max_new_tokens and batch_size are at least 1.")
        if not (0 <= self.temperature < math.inf and 0 < self.top_p <= 1):
            raise UserError("temperature is at least 0, and top_p lies above 0 and is at most 1.")
        if self.raw and self.system is not None:
            raise UserError("a system message belongs to a chat template, which raw leaves out: give one of them.")


@dataclass(frozen=True)
class Generated:
    """The rows of model_outputs.json, and what there is to say of them.

    `resumed`: answers that an earlier call had drawn; `tokens`, `seconds`: what this call drew and took. `cut`: answers
    that reached their limit of tokens; `empty`: answers without text, of which `overlong` because the prompt fills the
    model's context; `failed`: rows without an answer, which have `error` and are asked for again by the next call.
    """

    rows: list[Row]
    resumed: int
    tokens: int
    seconds: float
    cut: int
    empty: int
    overlong: int
    failed: int

    def text(self) -> str:
        """One sentence."""
        speed = f", {self.tokens / self.seconds:,.0f} tokens/s" if self.tokens and self.seconds else ""
        parts = [
            f"{len(self.rows) - self.failed:,} answers ({self.tokens:,} tokens in {self.seconds:.1f} s{speed})",
            f"{self.resumed:,} of them from before" * bool(self.resumed), f"{self.cut:,} cut at the limit" * bool(self.cut),
            f"{self.empty:,} empty" * bool(self.empty), f"{self.failed:,} failed" * bool(self.failed),
        ]  # fmt: skip
        return ", ".join(part for part in parts if part)


@dataclass(frozen=True)
class _Batch:
    """Rows that are drawn together, and how many tokens an answer of theirs may have."""

    rows: list[int]
    limit: int


def check_room(out: Path | str, *, overwrite: bool) -> None:
    """Raise UserError where `out` holds finished outputs that are not to be replaced; failed rows may be redone."""
    out = Path(out)
    if not out.exists() or overwrite:
        return
    if out.is_file() and any(ERROR in row for row in read_outputs(out)):
        return
    raise UserError(f"{out} is there already; give --overwrite to replace it, or another --out.")


def generate(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    *,
    generator: str,
    out: Path | str,
    drawing: Drawing | None = None,
    overwrite: bool = False,
    progress: bool = False,
) -> Generated:
    """Answer N prompts with a loaded model and write `out` (instruction, output, generator, dataset where known).

    Prompts are batched by length, the longest first; every batch has a seed of its own and is written to
    `out`.partial.jsonl when it is drawn, so that a killed call costs one batch and ends with the same bytes. A prompt
    that fills the model's context has an empty answer, and one that nearly does a shorter one, both said. `overwrite`
    replaces finished outputs and unfinished ones of other settings. Raises UserError where that is not given, and for a
    conversation that the tokenizer has no chat template for. Not covered: two calls on one `out` at a time.
    """
    drawing, out = drawing or Drawing(), Path(out)
    check_room(out, overwrite=overwrite)
    ids = prompt_ids(tokenizer, prompts, drawing)
    context = model.config.get_text_config().to_dict().get("max_position_embeddings")
    batches, overlong = _batches(ids, drawing, context)
    _say_lengths(batches, overlong, drawing, context)
    partial = _Partial(
        out.with_name(out.name + PARTIAL), _digest(model, ids, drawing), [b.rows for b in batches], overwrite
    )
    resumed = sum(len(rows) for rows in partial.answers.values())
    started, tokens = time.monotonic(), 0
    ends = set(end_token_ids(model, tokenizer))
    with tqdm(total=len(prompts), initial=resumed, desc="Generating", unit="answer", disable=not progress) as bar:
        for number, batch in enumerate(batches):
            if number in partial.answers:
                continue
            drawn = _draw(model, tokenizer, [ids[row] for row in batch.rows], batch.limit, drawing, number)
            partial.add(
                number,
                [
                    {"text": tokenizer.decode(own, skip_special_tokens=True), "cut": not own or own[-1] not in ends}
                    for own in drawn
                ],
            )
            tokens += sum(map(len, drawn))
            bar.set_postfix({"tokens/s": f"{tokens / (time.monotonic() - started):.0f}"}, refresh=False)
            bar.update(len(drawn))
    answers = partial.by_row()
    texts = [answers[row]["text"] if row in answers else "" for row in range(len(prompts))]
    rows = [_row(prompt, text, generator) for prompt, text in zip(prompts, texts, strict=True)]
    write_json(out, rows)
    partial.remove()
    found = Generated(
        rows, resumed, tokens, time.monotonic() - started, sum(answer["cut"] for answer in answers.values()),
        _empty(rows), len(overlong), 0,
    )  # fmt: skip
    _warn(found)
    return found


def generate_remote(
    client: JudgeClient,
    prompts: Sequence[Prompt],
    *,
    generator: str,
    out: Path | str,
    drawing: Drawing | None = None,
    overwrite: bool = False,
    progress: bool = False,
) -> Generated:
    """The same from the model behind an OpenAI-compatible endpoint, which has the chat template.

    Answers are kept in the client's cache, those drawn at a temperature under a seed of their row. A prompt without an
    answer has an empty output and says why in `error`; the next call asks again. `top_p` is the client's `extra_body`.
    Raises UserError as `generate` does, and as the client does.
    """
    drawing, out = drawing or Drawing(), Path(out)
    if drawing.raw:
        raise UserError("an endpoint for chats puts the chat template on by itself: leave --raw out.")
    check_room(out, overwrite=overwrite)
    started, known, before = time.monotonic(), client.found, client.tokens
    seeds: list[int | None] = [None] * len(prompts)
    if drawing.temperature > 0:
        seeds = [drawing.seed + place for place in range(len(prompts))]
    requests = [
        ChatRequest(
            prompt.messages(drawing.system), max_tokens=drawing.max_new_tokens, temperature=drawing.temperature,
            seed=seed, top_logprobs=None,
        )
        for prompt, seed in zip(prompts, seeds, strict=True)
    ]  # fmt: skip
    rows, cut, failed, written = [], 0, 0, 0
    for prompt, reply in zip(prompts, client.ask(requests, progress), strict=True):
        if isinstance(reply, Failure):
            rows.append({**_row(prompt, "", generator), ERROR: reply.message})
            failed += 1
            continue
        rows.append(_row(prompt, reply.text, generator))
        cut += reply.completion_tokens >= drawing.max_new_tokens
        written += 0 if reply.cached else reply.completion_tokens
    if failed == len(rows):
        raise UserError(f"none of {failed} prompts has an answer; the first says: {rows[0][ERROR]}")
    write_json(out, rows)
    logger.debug("%d tokens, prompts included.", client.tokens - before)
    found = Generated(
        rows, client.found - known, written, time.monotonic() - started, cut, _empty(rows) - failed, 0, failed
    )
    _warn(found)
    return found


def prompt_ids(tokenizer: Any, prompts: Sequence[Prompt], drawing: Drawing) -> list[list[int]]:
    """Token ids of each prompt, up to where the answer begins: through the chat template where there is one.

    Without one, or under `raw`, a prompt is its text. Which it is, is logged. Raises UserError for a conversation of
    several messages, or a system message, without a template.
    """
    templated = tokenizer.chat_template is not None and not drawing.raw
    if templated:
        logger.info("Prompts go through the chat template (raw leaves it out).")
        options = {"add_generation_prompt": True, "tokenize": True, "return_dict": True}
        return [
            list(tokenizer.apply_chat_template(prompt.messages(drawing.system), **options)["input_ids"])
            for prompt in prompts
        ]
    logger.info(
        "Prompts are read as plain text%s.", "" if drawing.raw else ": the tokenizer of this model has no chat template"
    )
    long = [place for place, p in enumerate(prompts) if not isinstance(p.content, str) and len(p.content) > 1]
    if long or drawing.system is not None:
        what = "a system message" if drawing.system is not None else f"prompt {long[0] + 1}, a conversation,"
        raise UserError(f"{what} needs a chat template, and plain text has none: give texts, or a model with one.")
    return [_plain(tokenizer, prompt.instruction) for prompt in prompts]


def _plain(tokenizer: Any, text: str) -> list[int]:
    ids = list(tokenizer(text)["input_ids"])
    # Some tokenizers end every text, after which there is nothing to say.
    return ids[:-1] if len(ids) > 1 and ids[-1] == tokenizer.eos_token_id else ids


def _batches(ids: list[list[int]], drawing: Drawing, context: int | None) -> tuple[list[_Batch], list[int]]:
    """Rows by length, and those whose prompt fills the context. What an answer may have follows from its batch alone."""

    def room(row: int) -> int:
        return drawing.max_new_tokens if context is None else min(drawing.max_new_tokens, context - len(ids[row]))

    order = sorted(range(len(ids)), key=lambda row: -len(ids[row]))
    batches: list[_Batch] = []
    for row in (row for row in order if room(row) > 0):
        last = batches[-1] if batches else None
        if last is None or len(last.rows) == drawing.batch_size or last.limit < LEAST_SHARE * room(row):
            batches.append(_Batch([row], room(row)))
        else:
            last.rows.append(row)
    return batches, [row for row in order if room(row) <= 0]


def _say_lengths(batches: list[_Batch], overlong: list[int], drawing: Drawing, context: int | None) -> None:
    shortened = sum(len(batch.rows) for batch in batches if batch.limit < drawing.max_new_tokens)
    if shortened:
        least = min(batch.limit for batch in batches)
        logger.info(
            "%d answers may have fewer than %d tokens, at least %d: the model's context holds %d.",
            shortened, drawing.max_new_tokens, least, context,
        )  # fmt: skip
    if overlong:
        logger.warning(
            "%d prompts fill the model's context of %d tokens and have empty answers, such as prompt %d.",
            len(overlong), context, min(overlong) + 1,
        )  # fmt: skip


def _draw(
    model: Any, tokenizer: Any, ids: list[list[int]], limit: int, drawing: Drawing, number: int
) -> list[list[int]]:
    seed = hashlib.blake2b(f"{drawing.seed}:{number}".encode(), digest_size=8).digest()
    groups = sample_groups(
        model, tokenizer, ids, samples=1, max_new_tokens=limit, temperature=drawing.temperature, top_p=drawing.top_p,
        seed=int.from_bytes(seed, "big") >> 1, batch_size=len(ids),
    )  # fmt: skip
    return [group[0] for group in groups]


def _digest(model: Any, ids: list[list[int]], drawing: Drawing) -> str:
    """What answers depend on: weights (their sums stand for them), prompts as the model reads them, settings."""
    digest = hashlib.sha256(json.dumps([ids, asdict(drawing)], sort_keys=True).encode())
    for name, weight in model.named_parameters():
        digest.update(f"{name}{tuple(weight.shape)}{weight.dtype}{weight.detach().sum(dtype=torch.float64).item()!r}".encode())
    return digest.hexdigest()


class _Partial:
    """Answers drawn so far: a line that says of what, then one a batch; what a kill left of the last line is dropped."""

    def __init__(self, path: Path, digest: str, batches: list[list[int]], overwrite: bool) -> None:
        self._path, self._batches = path, batches
        self.answers: dict[int, list[Row]] = {}
        header, lines = json.dumps({"made_of": digest}), self._lines()
        if lines and lines[0] != {"made_of": digest} and not overwrite:
            raise UserError(
                f"{path} holds unfinished outputs of another model, other prompts or settings; go on with those, or "
                "give --overwrite to begin again."
            )
        if lines and lines[0] == {"made_of": digest}:
            self.answers = {line["batch"]: line["answers"] for line in lines[1:]}
            logger.info("Going on after %d of %d batches.", len(self.answers), len(batches))
        whole = "".join(
            [header + "\n", *(self._line(number, answers) for number, answers in self.answers.items())]
        )  # fmt: skip
        aside = path.with_name(f".{path.name}.{os.getpid()}.part")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            aside.write_text(whole, encoding="utf-8")
            os.replace(aside, path)
        except OSError as error:
            raise UserError(f"{path} cannot be written: {error.strerror or error}.") from error

    def add(self, number: int, answers: list[Row]) -> None:
        """Write a batch down."""
        self.answers[number] = answers
        try:
            with open(self._path, "a", encoding="utf-8") as handle:
                handle.write(self._line(number, answers))
        except OSError as error:
            raise UserError(f"{self._path} cannot be written: {error.strerror or error}.") from error

    def by_row(self) -> dict[int, Row]:
        """Each row's answer."""
        return {
            row: answer
            for number, answers in self.answers.items()
            for row, answer in zip(self._batches[number], answers, strict=True)
        }

    def remove(self) -> None:
        self._path.unlink(missing_ok=True)

    def _line(self, number: int, answers: list[Row]) -> str:
        return json.dumps({"batch": number, "answers": answers}) + "\n"

    def _lines(self) -> list[Any]:
        try:
            text = self._path.read_text(encoding="utf-8")
        except FileNotFoundError:
            return []
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{self._path} cannot be read: {error}.") from error
        found = []
        for line in text.split("\n")[:-1]:  # the last line has ended, or is no line
            try:
                found.append(json.loads(line))
            except ValueError:
                break
        return found


def _row(prompt: Prompt, output: str, generator: str) -> Row:
    dataset = {} if prompt.dataset is None else {"dataset": prompt.dataset}
    return {**dataset, "instruction": prompt.instruction, "output": output, "generator": generator}


def _empty(rows: list[Row]) -> int:
    return sum(not row["output"].strip() for row in rows)


def _warn(found: Generated) -> None:
    if found.failed:
        reasons = [row[ERROR] for row in found.rows if ERROR in row]
        logger.warning(
            "%d prompts have no answer (%s); the same command asks for them again.", found.failed, reasons[0]
        )
    if found.empty > found.overlong:
        logger.warning("%d answers are empty.", found.empty - found.overlong)
