"""Recipes and data sets as hypothesis draws them: mostly right, with one to three things wrong or odd in each."""

import json
import math
from dataclasses import dataclass, fields
from enum import Enum
from types import NoneType
from typing import Any, Literal, get_args, get_origin, get_type_hints

import yaml
from hypothesis import strategies as st

from llmalign.methods import METHODS
from llmalign.recipe import DataSection
from llmalign.trainers.loading import ModelConfig
from llmalign.values import _options
from tests.diffusion.training import png

#: what a run is given besides; a recipe may still set the same keys, and the command line wins
ALWAYS = {"max_steps": "1", "output_dir": "run", "report_to": "none"}
#: keys that are left alone, and why
LEFT_OUT = {
    "method": "chosen by the case",
    "model_name_or_path": "chosen by the case",
    "dataset_name": "chosen by the case",
    "torch_compile": "compiling takes minutes",
    "torch_compile_backend": "switches torch_compile on",
    "torch_compile_mode": "switches torch_compile on",
    "auto_find_batch_size": "retries with pauses of seconds",
    "debug": "tpu_metrics_debug and underflow_overflow change the process",
    "ddp_backend": "of launched runs",
    "project": "of a tracker that is not installed",
}
OPEN_FIELDS = ("alarm_prompts", "eval_on_start")
SPECIAL = [0.0, -0.0, 0.5, 1.0, -1.0, 2.5, 1e-300, 1e300, math.nan, math.inf, -math.inf]

texts = st.one_of(
    st.sampled_from(
        ["", " ", "\n", "a", "true", "null", "-1", "nan", "x" * 600, "\u0000", "é\u0301", "🙂", "\ufeff", "~"]
    ),
    st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=12),
)
scalars = st.one_of(st.none(), st.booleans(), st.integers(-2, 7), st.sampled_from(SPECIAL), texts)
anything = st.recursive(
    scalars,
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(texts, inner, max_size=2)),
    max_leaves=4,
)
sentences = st.text(alphabet="abcdefgh ,.?", min_size=3, max_size=20).map(lambda text: f"w{text}")


@dataclass(frozen=True)
class Case:
    """A recipe's text, the rows' file and its bytes, and what is typed besides."""

    method: str
    recipe: str
    data_name: str
    data: bytes
    words: tuple[str, ...] = ()
    pictures: tuple[tuple[str, bytes], ...] = ()


def hints_of(method: str) -> dict[str, Any]:
    """Every key that a recipe of this method may hold, with its type."""
    owners = (DataSection, ModelConfig, METHODS[method].config)
    known: dict[str, Any] = {}
    for owner in owners:
        hints = get_type_hints(owner)
        known |= {entry.name: hints[entry.name] for entry in fields(owner) if entry.init}
    return {name: hint for name, hint in known.items() if name not in LEFT_OUT}


def _plain(value: Any) -> Any:
    """A choice as YAML has it."""
    return _plain(value.value) if isinstance(value, Enum) else value


def of_type(hint: Any) -> st.SearchStrategy[Any]:
    """Values that a field declares, edges among them."""
    kinds = []
    for option in _options(hint):
        origin = get_origin(option) or option
        if origin is Literal:
            kinds.append(st.sampled_from([_plain(choice) for choice in get_args(option)]))
        elif isinstance(origin, type) and issubclass(origin, Enum):
            kinds.append(st.sampled_from([_plain(member) for member in origin]))
        else:
            kinds.append(_PLAIN.get(origin, anything))
    return st.one_of(kinds)


_PLAIN = {
    NoneType: st.none(), bool: st.booleans(), int: st.integers(-1, 5), float: st.sampled_from(SPECIAL), str: texts,
    list: st.lists(scalars, max_size=3), dict: st.dictionaries(texts, scalars, max_size=2),
}  # fmt: skip


IMAGE_KINDS = ("image_pairs", "images", "captions")


# Rows


@st.composite
def rows_of(draw: st.DrawFn, kind: str) -> list[dict[str, Any]]:
    """Six to nine rows as the kind asks for, no two alike."""
    count = draw(st.integers(6, 9))
    if kind in IMAGE_KINDS:
        captions = [f"{draw(sentences)}{number}" for number in range(count)]
        sides = {"image_pairs": ("chosen", "rejected"), "images": ("image",)}.get(kind, ())
        return [
            {"caption": caption} | {side: f"{side}-{number}.png" for side in sides}
            for number, caption in enumerate(captions)
        ]
    chat = draw(st.booleans())
    rows = []
    for number in range(count):
        prompt, one, two = (f"{draw(sentences)}{number}{place}" for place in "abc")
        answers = [one, two]
        if chat and kind != "groups":
            prompt = [{"role": "user", "content": prompt}]
            answers = [[{"role": "assistant", "content": answer}] for answer in answers]
        if kind == "pairs":
            rows.append({"prompt": prompt, "chosen": answers[0], "rejected": answers[1]})
        elif kind == "groups":
            rows.append({"prompt": prompt, "completions": answers, "rewards": [1.0, draw(st.sampled_from([0.0, 0.5]))]})
        elif kind == "prompts":
            rows.append({"prompt": prompt})
        elif chat:
            rows.append({"messages": prompt + answers[0]})
        else:
            rows.append({"prompt": prompt, "completion": answers[0]})
    return rows


@st.composite
def spoilt(draw: st.DrawFn, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows with one thing changed in one of them, or in all."""
    rows = json.loads(json.dumps(rows))
    what = draw(
        st.sampled_from(["value", "drop", "extra", "inside", "twice", "none", "numbers", "all", "few", "identical"])
    )
    row = rows[draw(st.integers(0, len(rows) - 1))]
    name = draw(st.sampled_from(sorted(row)))
    if what == "value":
        row[name] = draw(anything)
    elif what == "drop":
        for each in rows if draw(st.booleans()) else [row]:
            each.pop(name, None)
    elif what == "extra":
        known = ["base", "flipped", "row_id", "ref_chosen_logps", "last_chosen_logps", "images", "tools", "score", "x"]
        extra = draw(st.sampled_from(known))
        for each in rows if draw(st.booleans()) else [row]:
            each[extra] = draw(anything)
    elif what == "inside":
        if isinstance(row[name], list) and row[name]:
            place = draw(st.integers(0, len(row[name]) - 1))
            if isinstance(row[name][place], dict):
                row[name][place][draw(st.sampled_from(["role", "content", "tool_calls"]))] = draw(anything)
            else:
                row[name][place] = draw(anything)
    elif what == "twice":
        rows += [row] * draw(st.integers(1, 3))
    elif what == "numbers":
        names = ["ref_chosen_logps", "ref_rejected_logps"]
        for each in rows:
            each |= {column: draw(st.sampled_from([-1.5, -30.0, math.nan, math.inf])) for column in names}
    elif what == "all":
        value = draw(anything)
        for each in rows:
            each[name] = value
    elif what == "few":
        rows = rows[: draw(st.integers(0, 2))]
    elif what == "identical":
        if "chosen" in row:
            row["rejected"] = row["chosen"]
    return rows


def as_file(rows: list[Any], suffix: str) -> bytes:
    """The rows as a file of this kind holds them."""
    if suffix == ".json":
        return json.dumps(rows).encode()
    if suffix == ".csv":
        names = list(dict.fromkeys(name for row in rows for name in row))
        lines = [",".join(_cell(name) for name in names)]
        lines += [",".join(_cell(row.get(name)) for name in names) for row in rows]
        return "\n".join(lines).encode("utf-8", "surrogatepass")
    return "\n".join(json.dumps(row) for row in rows).encode()


def _cell(value: Any) -> str:
    text = "" if value is None else value if isinstance(value, str) else json.dumps(value)
    return '"' + text.replace('"', '""') + '"'


@st.composite
def damaged(draw: st.DrawFn, content: bytes) -> bytes:
    """The file with its bytes cut, changed or added to; half of the time as it is."""
    what = draw(st.sampled_from(["whole"] * 10 + ["cut", "flip", "empty", "garbage", "mark"]))
    if what == "cut":
        return content[: draw(st.integers(0, len(content)))]
    if what == "flip" and content:
        place = draw(st.integers(0, len(content) - 1))
        return content[:place] + bytes([draw(st.integers(0, 255))]) + content[place + 1 :]
    if what == "empty":
        return b""
    if what == "garbage":
        return content + draw(st.binary(max_size=20))
    return b"\xef\xbb\xbf" + content if what == "mark" else content


# Recipes


@st.composite
def recipe_values(draw: st.DrawFn, method: str) -> dict[str, Any]:
    """Zero to three keys of the method with values of their type, or of any."""
    hints = hints_of(method)
    names = draw(st.lists(st.sampled_from(sorted(hints)), max_size=3, unique=True))
    return {name: draw(of_type(hints[name]) if draw(st.integers(0, 9)) != 3 else anything) for name in names}


_ODD_TEXTS = (
    "!!python/object/apply:os.system ['touch it-ran']",
    "a: !!python/name:os.system",
    "- 1\n- 2",
    "method: rpo\nmethod: dpo",
    "a: &x [*x]",
    "\tmethod: rpo",
    "{",
    "",
    "null",
    "1: 2",
    "method: [rpo]",
    "method: {a: 1}",
)


@st.composite
def cases(draw: st.DrawFn, model: str) -> Case:
    """One command line of `llmalign train` with its files; `model` is the folder of a tiny model."""
    of_images = draw(st.integers(0, 7)) == 5  # which take longer
    method = draw(st.sampled_from(sorted(name for name, found in METHODS.items() if found.of_images == of_images)))
    rows = draw(rows_of(METHODS[method].kind))
    named = [value for row in rows for value in row.values() if str(value).endswith(".png")]
    pictures = tuple((name, draw(damaged(png(place)))) for place, name in enumerate(named))
    for _ in range(draw(st.sampled_from([0, 0, 0, 1, 1, 2]))):
        rows = draw(spoilt(rows)) if rows and all(rows) else rows
    suffix = draw(st.sampled_from([".jsonl", ".jsonl", ".json", ".csv"]))
    data = draw(damaged(as_file(rows, suffix)))
    values = {
        "method": method, "model_name_or_path": model, "dataset_name": f"rows{suffix}", "max_length": 96,
        "per_device_train_batch_size": 4, "save_strategy": "no",
    }  # fmt: skip
    if of_images:
        del values["max_length"]
        values["model_name_or_path"] = "embedded:tiny"
    if METHODS[method].kind == "captions":
        values |= {"reward_funcs": ["brightness"], "rounds": 1, "pairs_per_round": 2, "sampling_steps": 2}
    if METHODS[method].kind == "prompts":
        del values["max_length"]
        values |= {"num_generations": 2, "max_completion_length": 4, "reward_funcs": ["reward.py:reward"]}
    values |= draw(recipe_values(method))
    text = yaml.safe_dump(values, allow_unicode=True)
    if draw(st.integers(0, 29)) == 17:
        text = draw(st.sampled_from(_ODD_TEXTS))
    elif draw(st.integers(0, 29)) == 19:
        text = draw(damaged(text.encode())).decode("utf-8", "replace")
    words: list[str] = []
    if draw(st.integers(0, 5)) == 4:
        name = draw(st.sampled_from([*sorted(hints_of(method)), "resume", "nonsense", "beta"]))
        words = [f"--{name}", str(draw(scalars))]
    return Case(method, text, f"rows{suffix}", data, tuple(words), pictures)
