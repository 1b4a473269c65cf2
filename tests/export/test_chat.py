"""A conversation by lines: turns, commands, a full context, an answer that is stopped, and a pipe."""

import io
import json
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, BloomConfig, BloomForCausalLM

from llmalign.chat import Chat, Conversation, Drawing
from llmalign.cli import main
from llmalign.errors import UserError

GREEDY = Drawing(temperature=0.0, max_new_tokens=8)
Chats = Callable[..., Chat]


@pytest.fixture
def chats(tiny_model: Any, tiny_model_dir: Path) -> Chats:
    """Makes a chat of the random model, which answers nonsense and seldom ends, with its output in memory."""

    def make(sampling: Drawing = GREEDY, *, template: bool = True, **options: Any) -> Chat:
        tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
        if not template:
            tokenizer.chat_template = None
        streams = {"out": io.StringIO(), "notes": io.StringIO()}
        return Chat(tiny_model, tokenizer, sampling, name="tiny", **{**streams, **options})

    return make


@pytest.fixture
def ctrl_c() -> Iterator[None]:
    """The interrupt as a terminal's program has it; what a shell starts in the background ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def read_from(*lines: str) -> Callable[[], str]:
    left: Iterator[str] = iter(lines)

    def read() -> str:
        for line in left:
            return line
        raise EOFError

    return read


def said(chat: Chat) -> tuple[str, str]:
    return chat._out.getvalue(), chat._notes.getvalue()


def greedy(chat: Chat, messages: list[dict[str, str]], new_tokens: int = 8) -> str:
    """The continuation by transformers' own loop over argmax, without a cache."""
    tokenizer = chat.tokenizer
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    start = len(ids)
    while len(ids) - start < new_tokens and (len(ids) == start or ids[-1] != tokenizer.eos_token_id):
        with torch.no_grad():
            ids.append(int(chat.model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    return tokenizer.decode(ids[start:], skip_special_tokens=True)


def test_turns_see_the_turns_before(chats: Chats) -> None:
    chat = chats(system="Be calm.")
    chat.run(read_from("Hello.\n", "And then?", ""))
    messages = [{"role": "system", "content": "Be calm."}]
    for text in ("Hello.", "And then?"):
        messages.append({"role": "user", "content": text})
        messages.append({"role": "assistant", "content": greedy(chat, messages)})
    assert chat.conversation.messages == messages[1:]
    assert said(chat)[0] == messages[2]["content"] + "\n" + messages[4]["content"] + "\n"


def test_an_answer_is_written_word_by_word(chats: Chats) -> None:
    class Written(io.StringIO):
        parts: list[str] = []

        def write(self, text: str) -> int:
            self.parts.append(text)
            return super().write(text)

    chat = chats(Drawing(temperature=0.0, max_new_tokens=60), out=Written())
    answer = chat.answer("Please write a short and polite answer to the question.")
    parts = chat._out.parts
    assert "".join(parts) == answer + "\n" and len([part for part in parts if part.strip()]) > 3


def test_commands(chats: Chats, tmp_path: Path) -> None:
    chat = chats()
    file = tmp_path / "chat.json"
    chat.run(read_from("One.", "Two.", "/undo", "/system Be brief.", "Three.", f"/save {file}", "/quit", "Four."))
    saved = json.loads(file.read_text())
    turns = [message["content"] for message in saved["messages"] if message["role"] == "user"]
    assert turns == ["One.", "Three."] and saved["messages"][0] == {"role": "system", "content": "Be brief."}
    assert saved["model"] == "tiny" and saved["sampling"]["max_new_tokens"] == 8
    chat.run(read_from("/reset", "/system", "Five.", f"/save {file}"))  # its own file may be written again
    saved = json.loads(file.read_text())["messages"]
    assert [message["role"] for message in saved] == ["user", "assistant"] and saved[0]["content"] == "Five."
    assert [path.name for path in tmp_path.iterdir()] == ["chat.json"]


def test_what_cannot_be_done_is_said_and_the_talk_goes_on(chats: Chats, tmp_path: Path) -> None:
    there = tmp_path / "there.json"
    there.write_text("mine")
    chat = chats()
    lines = ["/undo", "/dance", "/save", "/undo now", f"/save {there}", f"/save {tmp_path}/no/where.json", "/help"]
    chat.run(read_from(*lines, "Hello."))
    notes = said(chat)[1].splitlines()
    for line, expected in zip(
        notes,
        [
            "no turn to take back",
            "'/dance'",
            "'/save'",
            "'/undo now'",
            "is there already",
            "cannot be written",
            "/reset",
        ],
        strict=True,
    ):
        assert expected in line
    assert there.read_text() == "mine" and len(chat.conversation.messages) == 2


def test_ctrl_c_stops_the_answer_and_not_the_program(chats: Chats, ctrl_c: None) -> None:
    """The signal comes while the answer is written, and once while a line is read."""

    class Interrupted(io.StringIO):
        left = 1

        def write(self, text: str) -> int:
            super().write(text)
            if text.strip() and self.left:
                self.left -= 1
                signal.raise_signal(signal.SIGINT)
            return len(text)

    lines = iter(["Hello.", "interrupt", "Again."])

    def read() -> str:
        line = next(lines, None)
        if line is None:
            raise EOFError
        if line == "interrupt":
            signal.raise_signal(signal.SIGINT)
        return line

    chat = chats(Drawing(temperature=0.0, max_new_tokens=200), out=Interrupted())
    chat.run(read)
    first, second = chat.conversation.messages[1]["content"], chat.conversation.messages[3]["content"]
    assert said(chat)[1].splitlines() == ["[stopped]", "", "/quit or the end of the input (Ctrl-D) leaves."]
    assert said(chat)[0] == f"{first}\n{second}\n" and 0 < len(first) < 100 < len(second)


def test_a_full_context_drops_the_oldest_turns(chats: Chats) -> None:
    """512 tokens, of which 100 are for the answer; the system prompt stays."""
    chat = chats(Drawing(temperature=0.0, max_new_tokens=100), system="Be calm.")
    chat.run(read_from(*[f"Turn {number}: " + "river " * 12 for number in range(6)]))
    out, notes = said(chat)
    assert "the oldest turn is dropped" in notes and len(out.splitlines()) >= 6
    conversation = chat.conversation
    assert len(conversation.messages) == 12 and conversation.forgotten > 0
    ids, dropped = conversation.prompt("And now?", 100)
    text = chat.tokenizer.decode(ids)
    assert text.startswith("<|system|>Be calm.") and len(ids) <= 412 and "Turn 0:" not in text and "Turn 5:" in text
    assert conversation.prompt("And now?", 100) == (ids, 0)
    with pytest.raises(UserError, match="this turn has .* room for 412: shorten it"):
        conversation.prompt("river " * 500, 100)


def test_half_of_the_context_is_for_prompts(tiny_tokenizer: Any) -> None:
    conversation = Conversation(tiny_tokenizer, 64)
    assert conversation.prompt("Hello.", 10_000)[1] == 0
    with pytest.raises(UserError, match="room for 32"):
        conversation.prompt("river " * 40, 10_000)


def test_without_a_chat_template_lines_are_continued(chats: Chats) -> None:
    chat = chats(template=False)
    chat.run(read_from("The river was", "The river was", "/system Be calm."))
    out, notes = said(chat)
    first, second = out.splitlines()
    assert first == second  # no turn sees another
    assert "no chat template" in notes.splitlines()[0] and "no place for a system prompt" in notes
    with pytest.raises(UserError, match="no place for a system prompt"):
        chats(template=False, system="Be calm.")


def test_a_template_that_refuses_a_system_prompt(chats: Chats) -> None:
    chat = chats()
    chat.tokenizer.chat_template = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
        + chat.tokenizer.chat_template
    )
    chat.run(read_from("/system Be calm.", "Hello."))
    assert "refuses these turns (no system role)" in said(chat)[1] and chat.conversation.system is None
    assert len(chat.conversation.messages) == 2


def test_a_seed_draws_the_same_again(chats: Chats) -> None:
    answers = []
    for seed in (3, 3, 4):
        chat = chats(Drawing(temperature=1.0, top_p=1.0, max_new_tokens=12, seed=seed))
        answers.append((chat.answer("Hello."), chat.answer("Hello.")))
    assert answers[0] == answers[1] != answers[2] and answers[0][0] != answers[0][1]


@pytest.mark.parametrize(
    "options, words",
    [({"temperature": -1.0}, "at least 0"), ({"top_p": 0.0}, "above 0"), ({"max_new_tokens": 0}, "at least 1")],
)
def test_numbers_that_cannot_be(options: dict[str, float], words: str) -> None:
    with pytest.raises(UserError, match=words):
        Drawing(**options)


def test_a_pipe(tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """One line, one turn: answers alone on standard output, and the end of the input leaves."""
    monkeypatch.setattr("sys.stdin", io.StringIO("Hello.\n/undo\nHello.\n/dance\n"))
    assert main(["chat", str(tiny_model_dir), "--temperature", "0", "--max_new_tokens", "4"]) == 0
    written = capsys.readouterr()
    first, second = written.out.splitlines()
    assert first == second
    assert "taken back" in written.err and "'/dance'" in written.err


def test_the_command_refuses(tiny_model_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["chat", str(tiny_model_dir), "--wrong"]) == 2
    assert "chat does not know --wrong" in capsys.readouterr().err
    assert main(["chat", str(tiny_model_dir), "--top_p", "2"]) == 2


def test_a_model_s_own_settings_change_nothing(chats: Chats) -> None:
    chat = chats()
    own = chat.model.generation_config
    before = own.to_dict()
    own.update(repetition_penalty=9.0, min_new_tokens=8, suppress_tokens=[*range(100)])
    try:
        assert chat.answer("Hello.") == greedy(chat, [{"role": "user", "content": "Hello."}])
        assert chat.model.generation_config is own and own.repetition_penalty == 9.0
    finally:
        own.update(**before)


def test_a_model_without_an_end_of_its_context(tiny_tokenizer: Any) -> None:
    config = BloomConfig(vocab_size=len(tiny_tokenizer), hidden_size=16, n_layer=1, n_head=2)
    chat = Chat(BloomForCausalLM(config).eval(), tiny_tokenizer, GREEDY, out=io.StringIO(), notes=io.StringIO())
    chat.run(read_from("a " * 300, "b " * 300))
    assert len(chat.conversation.messages) == 4 and said(chat)[1] == ""


def test_memory_that_runs_out_leaves_the_talk(chats: Chats, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: Any, **options: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    chat = chats()
    with monkeypatch.context() as patch:
        patch.setattr(chat.model, "forward", full)
        chat.run(read_from("Hello."))
    assert "lower --max_new_tokens" in said(chat)[1] and not chat.conversation.messages
    assert chat.answer("Hello.") is not None


def test_a_temperature_that_is_no_number() -> None:
    with pytest.raises(UserError, match="temperature"):
        Drawing(temperature=float("nan"))
