"""Training rows drawn from the embedded world, and the sample files that ship with the project."""

import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from llmalign.embedded.answers import compose
from llmalign.embedded.grammar import Prompt, split
from llmalign.embedded.stories import openings
from llmalign.embedded.truth import score
from llmalign.errors import UserError

Scorer = Callable[[str, str], float]
Row = dict[str, Any]

SAMPLE_SEED = 20


def sft_rows(n: int, seed: int, *, subset: Sequence[Prompt] | None = None) -> list[Row]:
    """n rows of `prompt` and `completion` in all styles; prompts come from `subset` (default: the train prompts)."""
    rng = random.Random(f"sft {seed}")
    chosen = rng.choices(subset or split()[0], k=n)
    return [{"prompt": prompt.text, "completion": compose(prompt, rng)} for prompt in chosen]


def pair_rows(
    n: int,
    seed: int,
    *,
    flip_rate: float = 0.0,
    scorer: Scorer = score,
    min_margin: float = 0.5,
    subset: Sequence[Prompt] | None = None,
) -> list[Row]:
    """n rows of `prompt`, `chosen`, `rejected` and `flipped`, the better of two answers chosen by `scorer`.

    The two are at least `min_margin` apart. Each label is swapped with probability `flip_rate`, and `flipped` says
    whether it was; the same seed gives the same texts at every flip rate. Prompts come from `subset` (default: the
    train prompts). Raises UserError for a flip rate outside [0, 1].
    """
    if not 0 <= flip_rate <= 1:
        raise UserError(f"flip_rate must lie between 0 and 1, not {flip_rate}.")
    texts, flips = random.Random(f"pairs {seed}"), random.Random(f"flips {seed}")
    pool = subset or split()[0]
    rows: list[Row] = []
    while len(rows) < n:
        prompt = texts.choice(pool)
        first, second = compose(prompt, texts), compose(prompt, texts)
        margin = scorer(prompt.text, first) - scorer(prompt.text, second)
        if first == second or abs(margin) < min_margin:
            continue
        flipped = flips.random() < flip_rate
        chosen, rejected = (first, second) if (margin > 0) != flipped else (second, first)
        rows.append({"prompt": prompt.text, "chosen": chosen, "rejected": rejected, "flipped": flipped})
    return rows


def group_rows(
    n: int, seed: int, *, size: int = 4, scorer: Scorer = score, subset: Sequence[Prompt] | None = None
) -> list[Row]:
    """n rows of `prompt`, `completions` (`size` different ones) and their `rewards` under `scorer`."""
    rng = random.Random(f"groups {seed}")
    rows: list[Row] = []
    for prompt in rng.choices(subset or split()[0], k=n):
        completions: dict[str, None] = {}
        while len(completions) < size:
            completions[compose(prompt, rng)] = None
        rewards = [scorer(prompt.text, completion) for completion in completions]
        rows.append({"prompt": prompt.text, "completions": list(completions), "rewards": rewards})
    return rows


def as_conversation(row: Row) -> Row:
    """The same row with its texts as messages: prompts said by the user, everything else by the assistant."""

    def turn(role: str, text: str) -> list[dict[str, str]]:
        return [{"role": role, "content": text}]

    talk: Row = dict(row)
    if "prompt" in row:
        talk["prompt"] = turn("user", row["prompt"].strip())
    for key in ("completion", "chosen", "rejected"):
        if key in row:
            talk[key] = turn("assistant", row[key])
    if "completions" in row:
        talk["completions"] = [turn("assistant", text) for text in row["completions"]]
    return talk


def sample_files() -> dict[str, list[Row]]:
    """The rows of data/samples by file name; each says whether it is for `train` or `test` (held-out prompts).

    The openings of stories are not of this world and have no split.
    """
    files: dict[str, list[Row]] = {"sft": [], "pairs": [], "groups": [], "prompts": []}
    for name, subset, count in (("train", split()[0], 300), ("test", split()[1], 100)):
        seed = SAMPLE_SEED + (name == "test")
        pairs = pair_rows(count, seed, subset=subset)
        drawn = {
            "sft": sft_rows(count, seed, subset=subset),
            "pairs": [{key: row[key] for key in ("prompt", "chosen", "rejected")} for row in pairs],
            "groups": group_rows(count // 2, seed, subset=subset),
            "prompts": [{"prompt": prompt.text} for prompt in random.Random(seed).sample(subset, count)],
        }
        for file, rows in drawn.items():
            files[file] += [row | {"split": name} for row in rows]
    files["openings"] = [{"prompt": opening} for opening in openings(1400)]
    return files


def write_samples(folder: Path) -> list[Path]:
    """Write data/samples/*.jsonl; the bytes depend on nothing but this package."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for name, rows in sample_files().items():
        path = folder / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8", newline="\n")
        written.append(path)
    return written
