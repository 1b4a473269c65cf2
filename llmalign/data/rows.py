"""From a row as its source wrote it to the columns that llmalign trains on."""

import os
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from datasets import Features, List, Value

from llmalign.data import checks
from llmalign.data.checks import Content, Fault
from llmalign.data.readers import Row
from llmalign.data.specs import check_keys

LOGP_COLUMNS = ("ref_chosen_logps", "ref_rejected_logps", "last_chosen_logps", "last_rejected_logps")
KINDS: dict[str, dict[str, bool]] = {  # kind -> column -> is it required
    "pairs": {
        "prompt": False,
        "chosen": True,
        "rejected": True,
        "base": False,
        "flipped": False,
        **dict.fromkeys(LOGP_COLUMNS, False),
    },
    "groups": {"prompt": False, "completions": True, "rewards": True},
    "prompts": {"prompt": True},
    "text": dict.fromkeys(("messages", "prompt", "completion", "text"), False),
    "scored_groups": {"prompt": False, "completions": True, "rewards": True},
    "comparisons": dict.fromkeys(("instruction", "output_1", "output_2", "preference"), True),
}
GROUPED = ("groups", "scored_groups")
TEXT_SHAPES = (("messages",), ("prompt", "completion"), ("text",))
LEADING = {"pairs": "chosen", "prompts": "prompt", **dict.fromkeys(GROUPED, "completions")}  # are rows conversations?
TYPES = {  # column -> type; columns kept by name are numbers
    **dict.fromkeys(("prompt", "chosen", "rejected", "base", "messages", "completion", "text"), "content"),
    "completions": "contents",
    "rewards": "numbers",
    "flipped": "flag",
}
OWN_TYPES: dict[str, dict[str, str]] = {  # of single kinds; scores are numbers that may be missing or not finite
    "scored_groups": {"rewards": "scores"},
    "comparisons": {**dict.fromkeys(("instruction", "output_1", "output_2"), "content"), "preference": "score"},
}
CELLS = {
    "content": "text", "contents": "json", "numbers": "json", "number": "number", "flag": "flag", "text": "text",
    "texts": "json", "score": "score", "scores": "scores",
}  # fmt: skip
LEARNED = ("chosen", "rejected", "base", "completion", "output_1", "output_2")
SEEN_BY_MODEL = ("images", "image", "videos", "tools", "chat_template_kwargs")


@dataclass(frozen=True)
class Layout:
    """How the rows of one source become canonical: settled from its first row, then held against every other row."""

    kind: str
    sources: dict[str, Any]  # column -> where the source keeps it: a name, or a list of names
    conversational: bool
    watched: tuple[str, ...]  # columns that the first row lacks, so no other may have them
    carried: tuple[tuple[str, str], ...] = ()  # columns for the reward functions, with their types

    @property
    def features(self) -> Features:
        """The types of the canonical columns, `row_id` first."""
        messages = List({"role": Value("string"), "content": Value("string")})
        text = messages if self.conversational else Value("string")
        kinds = {
            "content": text,
            "contents": List(text),
            "numbers": List(Value("float64")),
            "number": Value("float64"),
            "flag": Value("bool"),
            "text": Value("string"),
            "texts": List(Value("string")),
            "score": Value("float64"),
            "scores": List(Value("float64")),
        }
        return Features({"row_id": Value("int64"), **{name: kinds[self._type(name)] for name in self.columns}})

    @property
    def columns(self) -> list[str]:
        """Names of the canonical columns, `row_id` left out."""
        return list(dict.fromkeys(["prompt", *self.sources])) if self.kind in GROUPED else list(self.sources)

    def canonical(self, row: Row, *, text_cells: bool) -> Row:
        """The canonical columns of a raw row, whose values are all text where it comes from CSV. Raises Fault."""
        for name in self.watched:
            if row.get(name) is not None:
                raise Fault(
                    f"has {name!r}, which the first row lacks; write `columns: {{{name}: null}}` to leave it out"
                )
        canonical = {name: self._value(name, row, text_cells) for name in self.sources}
        if self.kind == "pairs":
            _check_pair(canonical)
        elif self.kind in GROUPED:
            canonical = _checked_group(canonical)
        elif self.kind == "comparisons":
            _check_comparison(canonical)
        elif "messages" in canonical:
            _check_messages(canonical["messages"])
        for name in LEARNED:
            if name in canonical:
                checks.ends_with_assistant(name, canonical[name])
        return canonical

    def _value(self, name: str, row: Row, text_cells: bool) -> Any:
        kind = self._type(name)
        value = self._cell(name, row) if text_cells else checks.pick(row, self.sources[name])
        if kind == "content":
            return checks.content(name, value, self.conversational)
        if kind == "contents":
            return checks.contents(name, value, self.conversational)
        if kind in ("text", "texts"):
            return (checks.content if kind == "text" else checks.contents)(name, value, False)
        checked = {"numbers": checks.numbers, "number": checks.number, "flag": checks.flag}
        return {**checked, "score": checks.score, "scores": checks.scores}[kind](name, value)

    def _type(self, name: str) -> str:
        return dict(self.carried).get(name) or _type_in(self.kind, name)

    def _cell(self, name: str, row: Row) -> Any:
        source, wanted = self.sources[name], CELLS[self._type(name)]
        if isinstance(source, list):
            inner = {"contents": "text", "numbers": "number", "scores": "score"}.get(self._type(name), wanted)
            return checks.from_cell(name, checks.pick(row, source), inner)
        if source in row or "." not in source:
            return checks.from_cell(name, checks.pick(row, source), wanted)
        root, _, rest = source.partition(".")
        return checks.pick(checks.from_cell(root, checks.pick(row, root), "json"), rest)


def settle(
    kind: str, first: Row, *, columns: dict[str, Any] | None, keep: tuple[str, ...] = (), text_cells: bool = False
) -> Layout:
    """The layout of a source whose first row this is; `keep` names further columns: of numbers, or beside prompts of
    whatever the first row has there (text, a number, a flag, or a list of texts or numbers). Raises Fault.

    Raises UserError for a key of `columns` that is no column of this kind.
    """
    known = [*KINDS[kind], *keep]
    check_keys(columns or {}, known, f"`columns` for {kind}")
    mapped = columns or {}
    unseen = [name for name in SEEN_BY_MODEL if first.get(name) and name not in keep]
    if unseen and columns is None:
        raise Fault(
            f"has {unseen[0]!r}, which would change what the model sees and is not supported; name the columns to read "
            "under `columns` to leave it out"
        )
    sources = {}
    for name in known:
        if mapped.get(name) is not None:
            sources[name] = mapped[name]
        elif name not in mapped and (first.get(name) is not None or _may_be_null(kind, name) and name in first):
            sources[name] = name
        elif KINDS[kind].get(name, True):
            raise Fault(f"has no {name!r}; it has: {', '.join(first)}; say with `columns` what stands for {name!r}")
    if kind == "text":
        sources = _text_shape(sources, first)
    watched = tuple(name for name in KINDS[kind] if name not in sources and name not in mapped and kind != "text")
    leading = sources[LEADING[kind]] if kind in LEADING else next(iter(sources.values()))
    conversational = not text_cells and _is_conversation(checks.pick(first, leading), nested=kind in GROUPED)
    carried = tuple((name, _carried(name, checks.pick(first, sources[name]))) for name in keep if kind == "prompts")
    return Layout(kind, sources, conversational, watched, carried)


def has_columns(dataset: Iterable[Row], *columns: str) -> bool:
    """Whether the rows of a data set or stream have all of the columns, by its first row."""
    first = next(iter(dataset))
    return all(column in first for column in columns)


def _type_in(kind: str, name: str) -> str:
    return OWN_TYPES.get(kind, {}).get(name) or TYPES.get(name, "number")


def _may_be_null(kind: str, name: str) -> bool:
    return _type_in(kind, name) in ("score", "scores")


def _text_shape(sources: dict[str, Any], first: Row) -> dict[str, Any]:
    for shape in TEXT_SHAPES:
        if all(name in sources for name in shape):
            return {name: sources[name] for name in shape}
    raise Fault(f"has no 'messages', no 'prompt' with 'completion' and no 'text'; it has: {', '.join(first)}")


def _is_conversation(value: Any, nested: bool) -> bool:
    if nested:
        return isinstance(value, list) and bool(value) and isinstance(value[0], list)
    return isinstance(value, list)


def _carried(name: str, value: Any) -> str:
    """The type of a column that goes to the reward functions, by its first value."""
    if isinstance(value, bool):
        return "flag"
    if isinstance(value, (int, float)):
        return "number"
    if isinstance(value, str):
        return "text"
    if isinstance(value, list) and value and all(isinstance(item, str) for item in value):
        return "texts"
    if isinstance(value, list) and value and all(isinstance(item, (int, float)) for item in value):
        return "numbers"
    raise Fault(f"{name!r} must be text, a number, a flag or a list of texts or numbers to go to a reward function")


def _check_messages(turns: str | list[dict[str, str]]) -> None:
    if isinstance(turns, str):
        raise Fault(
            "'messages' is text and must be a list of messages; CSV cannot hold one: use JSON lines, or the columns "
            "'prompt' and 'completion'"
        )
    if not any(turn["role"] == "assistant" for turn in turns):
        raise Fault("'messages' has no message of the assistant, so nothing to learn")


def _check_pair(row: Row) -> None:
    chosen, rejected = row["chosen"], row["rejected"]
    if "prompt" in row:
        for name in ("chosen", "rejected"):
            _check_not_repeated(row["prompt"], name, row[name])
    elif isinstance(chosen, list):
        if chosen[0] != rejected[0] or min(len(chosen), len(rejected)) < 2:
            raise Fault("has no 'prompt', and 'chosen' and 'rejected' do not begin with the same message")
    elif not os.path.commonprefix([chosen, rejected]).strip():
        raise Fault("has no 'prompt', and 'chosen' and 'rejected' do not begin with the same words")


def _check_comparison(row: Row) -> None:
    for name in ("output_1", "output_2"):
        if _repeats(row["instruction"], row[name]):
            raise Fault(f"repeats the whole 'instruction' in {name!r}, which must hold the answer alone")


def _check_not_repeated(prompt: Content, name: str, completion: Content) -> None:
    if _repeats(prompt, completion):
        raise Fault(f"repeats the whole 'prompt' in {name!r}; write `columns: {{prompt: null}}` to have it split out")


def _repeats(prompt: Content, completion: Content) -> bool:
    return isinstance(prompt, list) and len(completion) > len(prompt) and completion[: len(prompt)] == prompt


def _checked_group(row: Row) -> Row:
    completions, rewards = row["completions"], row["rewards"]
    if rewards is None:
        rewards = row["rewards"] = [None] * len(completions)
    if len(completions) != len(rewards):
        raise Fault(f"has {len(completions)} completions and {len(rewards)} rewards")
    for index, completion in enumerate(completions):
        checks.ends_with_assistant(f"completions[{index}]", completion)
    if "prompt" in row:
        for index, completion in enumerate(completions):
            _check_not_repeated(row["prompt"], f"completions[{index}]", completion)
        return {"prompt": row["prompt"], **row}
    if not completions or isinstance(completions[0], str):
        raise Fault("has no 'prompt', which only conversations can hold inside their completions")
    prompt = completions[0][:-1]
    if not prompt or any(completion[:-1] != prompt for completion in completions):
        raise Fault("has no 'prompt', and its completions do not begin with the same messages")
    return {"prompt": prompt, "completions": [completion[-1:] for completion in completions], "rewards": rewards}
