"""A conversation in a terminal, or through a pipe: a line is a turn, and the answer is written as it is drawn."""

import json
import math
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import jinja2
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TextStreamer

from llmalign.errors import UserError
from llmalign.scores.sampling import check_sampling, context_length, generate_plainly, generation_config, memory_said

HELP = (
    "/reset starts anew, /undo takes the last turn back, /system TEXT sets the system prompt (without TEXT: none), "
    "/save FILE writes the conversation as JSON, /quit leaves; Ctrl-C stops an answer"
)
Message = dict[str, str]


@dataclass(frozen=True)
class Drawing:
    """How answers are drawn; temperature 0 is greedy, `seed` None differs each time.

    Raises UserError as `check_sampling` does.
    """

    temperature: float = 0.7
    top_p: float = 0.95
    max_new_tokens: int = 512
    seed: int | None = None

    def __post_init__(self) -> None:
        check_sampling(max_new_tokens=self.max_new_tokens, temperature=self.temperature, top_p=self.top_p)


@dataclass
class Conversation:
    """The turns so far, as they are sent to a model: messages of user and assistant by turns, after a system prompt.

    A tokenizer without a chat template has no turns: every text is continued by itself. `context` is in tokens; None
    has no limit.
    """

    tokenizer: PreTrainedTokenizerBase
    context: int | None
    system: str | None = None
    messages: list[Message] = field(default_factory=list)
    forgotten: int = 0  # messages of the start that are no longer sent

    @property
    def templated(self) -> bool:
        return self.tokenizer.chat_template is not None

    def prompt(self, text: str, room: int) -> tuple[list[int], int]:
        """Token ids of the conversation with `text` as its next turn, and how many turns were dropped to fit.

        `room` tokens of the context are left for the answer, at most half of it. The oldest turns go first, the system
        prompt stays. Raises UserError where `text` does not fit by itself, and for a template that refuses the turns.
        """
        most = math.inf if self.context is None else self.context - min(room, self.context // 2)
        forgotten, dropped = self.forgotten if self.templated else len(self.messages), 0
        while len(ids := self._ids(forgotten, text)) > most:
            if forgotten >= len(self.messages):
                raise UserError(f"this turn has {len(ids)} tokens, and the context has room for {most}: shorten it")
            forgotten, dropped = forgotten + 2, dropped + 1
        if self.templated:
            self.forgotten = forgotten
        return ids, dropped

    def _ids(self, start: int, text: str) -> list[int]:
        if not self.templated:
            return self.tokenizer(text)["input_ids"]
        system = [] if self.system is None else [{"role": "system", "content": self.system}]
        messages = [*system, *self.messages[start:], {"role": "user", "content": text}]
        try:
            written = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        except jinja2.TemplateError as error:
            raise UserError(f"the model's chat template refuses these turns ({error})") from error
        return self.tokenizer(written, add_special_tokens=False)["input_ids"]

    def add(self, text: str, answer: str) -> None:
        self.messages += [{"role": "user", "content": text}, {"role": "assistant", "content": answer}]

    def undo(self) -> bool:
        """Take the last turn back; False where there is none."""
        if not self.messages:
            return False
        del self.messages[-2:]
        self.forgotten = min(self.forgotten, len(self.messages))
        return True

    def reset(self) -> None:
        self.messages, self.forgotten = [], 0


class _Words(TextStreamer):
    """Writes an answer as it is drawn, word by word, and keeps it."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, write: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._write = write
        self.text = ""

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self.text += text
        self._write(text)


class Chat:
    """Reads turns and commands, one a line, until the input ends; answers go to `out`, all else to `notes`."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        sampling: Drawing,
        *,
        name: str = "model",
        system: str | None = None,
        out: IO[str] | None = None,
        notes: IO[str] | None = None,
    ) -> None:
        self.model, self.tokenizer, self.sampling, self.name = model, tokenizer, sampling, name
        self.conversation = Conversation(tokenizer, context_length(model.config))
        self._out, self._notes = out or sys.stdout, notes or sys.stderr
        self._saved: set[Path] = set()
        if system is not None:
            self._set_system(system)
        if sampling.seed is not None:
            torch.manual_seed(sampling.seed)

    def run(self, read: Callable[[], str]) -> None:
        """Take turns until `read` raises EOFError or a line is /quit; Ctrl-C at a line starts it anew."""
        if not self.conversation.templated:
            self._note("The model has no chat template: every line is continued as plain text, by itself.")
        while True:
            try:
                line = read().rstrip("\r\n")
            except EOFError:
                return
            except KeyboardInterrupt:
                self._note("\n/quit or the end of the input (Ctrl-D) leaves.")
                continue
            try:
                if not self.take(line):
                    return
            except UserError as error:
                self._note(f"llmalign: {error}")

    def take(self, line: str) -> bool:
        """One line: a command, a turn, or nothing; False where it leaves. Raises UserError for what cannot be done."""
        if not line.strip():
            return True
        command, _, rest = line.strip().partition(" ")
        if not command.startswith("/"):
            self.answer(line)
            return True
        if command == "/quit":
            return False
        commands = {"/reset": self._reset, "/undo": self._undo, "/help": lambda: self._note(HELP)}
        if command in commands and not rest:
            commands[command]()
        elif command == "/system":
            self._set_system(rest.strip() or None)
        elif command == "/save" and rest.strip():
            self._save(Path(rest.strip()).expanduser())
        else:
            raise UserError(f"there is no command {line.strip()!r}: {HELP}")
        return True

    def answer(self, text: str) -> str:
        """The answer to one turn, written as it is drawn; what was said before Ctrl-C is kept as the answer."""
        ids, dropped = self.conversation.prompt(text, self.sampling.max_new_tokens)
        if dropped:
            oldest = "the oldest turn is" if dropped == 1 else f"the oldest {dropped} turns are"
            self._note(f"The context is full: {oldest} dropped.")
        words = _Words(self.tokenizer, self._write)
        given = torch.tensor([ids], device=self.model.device)
        try:
            with memory_said("lower --max_new_tokens, or start anew with /reset"):
                generate_plainly(
                    self.model, self._config(len(ids)), input_ids=given, attention_mask=torch.ones_like(given),
                    streamer=words,
                )  # fmt: skip
            stopped = False
        except KeyboardInterrupt:
            words.end()
            stopped = True
        self._write("\n")
        if stopped:
            self._note("[stopped]")
        self.conversation.add(text, words.text)
        return words.text

    def _config(self, used: int) -> Any:
        most, context = self.sampling.max_new_tokens, self.conversation.context
        return generation_config(
            self.model, self.tokenizer, max_new_tokens=most if context is None else min(most, context - used),
            temperature=self.sampling.temperature, top_p=self.sampling.top_p,
        )  # fmt: skip

    def _reset(self) -> None:
        self.conversation.reset()
        self._note("The conversation starts anew.")

    def _undo(self) -> None:
        if not self.conversation.undo():
            raise UserError("there is no turn to take back")
        self._note("The last turn is taken back.")

    def _set_system(self, text: str | None) -> None:
        """Raises UserError where the template refuses it, and leaves what there was."""
        conversation = self.conversation
        if text is not None and not conversation.templated:
            raise UserError("the model has no chat template, so there is no place for a system prompt")
        before, conversation.system = conversation.system, text
        try:
            conversation.prompt("a", 0)
        except UserError:
            conversation.system = before
            raise
        self._note("There is no system prompt." if text is None else "The system prompt is set.")

    def _save(self, path: Path) -> None:
        if path.exists() and path not in self._saved:
            raise UserError(f"{path} is there already; name another file")
        sampling = {key: getattr(self.sampling, key) for key in ("temperature", "top_p", "max_new_tokens", "seed")}
        system = self.conversation.system
        messages = ([] if system is None else [{"role": "system", "content": system}]) + self.conversation.messages
        content = {"model": self.name, "sampling": sampling, "messages": messages}
        aside = path.with_name(f".{path.name}.{os.getpid()}.part")
        try:
            try:
                aside.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
                os.replace(aside, path)
            finally:
                aside.unlink(missing_ok=True)
        except OSError as error:
            raise UserError(f"{path} cannot be written: {error.strerror or error}") from error
        self._saved.add(path)
        self._note(f"Saved in {path}.")

    def _write(self, text: str) -> None:
        self._out.write(text)
        self._out.flush()

    def _note(self, text: str) -> None:
        print(text, file=self._notes, flush=True)
