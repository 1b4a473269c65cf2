"""Stages without a model: a run of options alone, rows written by hand, an oracle that is a table."""

from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from llmalign.loop.comparisons import Comparisons
from llmalign.loop.config import LoopConfig
from llmalign.rewards.preference import FunctionOracle


def run_of(*, groups: bool = False, **loop: Any) -> Any:
    """What judging, pairing and measuring read of a run."""
    if "oracle" not in loop:
        loop |= {"oracle": "preference_function", "preference_function": "mine.py:f"}
    config = SimpleNamespace(disable_tqdm=True)
    loop = {"max_failed": 1.0, **loop}
    return SimpleNamespace(loop=LoopConfig(**loop), groups=groups, config=config, main=True)


def sampled(place: int, texts: Sequence[str], **columns: Any) -> dict[str, Any]:
    """A row of `samples.jsonl`; a text's token ids are its letters, and one that ends with `!` ended by itself."""
    return {
        "place": place, "row_id": 10 + place, "prompt": f"prompt {place}", "prompt_ids": [5, place], **columns,
        "completions": list(texts), "completion_ids": [[ord(letter) for letter in text] for text in texts],
        "ended": [text.endswith("!") for text in texts],
    }  # fmt: skip


class Oracle(FunctionOracle):
    """A function of two texts, which keeps what it was asked, call by call."""

    def __init__(self, beats: Callable[[str, str], float], **options: Any) -> None:
        self.calls: list[list[tuple[Any, str, str]]] = []
        self.columns: list[dict[str, Any]] = []

        def preferences(prompts: Any, first: Any, second: Any, **columns: Any) -> list[float]:
            self.calls.append(list(zip(prompts, first, second, strict=True)))
            self.columns.append(columns)
            return [beats(a, b) for a, b in zip(first, second, strict=True)]

        super().__init__(preferences, "mine", **options)

    @property
    def asked(self) -> list[tuple[Any, str, str]]:
        """All pairs, one after the other."""
        return [pair for call in self.calls for pair in call]


def comparisons(folder: Path, beats: Callable[[str, str], float], identity: str = "mine") -> Comparisons:
    """Comparisons kept in a file of this folder; `beats` is asked where it says nothing."""
    return Comparisons(folder / "comparisons.sqlite", Oracle(beats), identity)


def longer(first: str, second: str) -> float:
    """The longer text is likelier to be preferred."""
    return 0.5 if len(first) == len(second) else 0.9 if len(first) > len(second) else 0.2
