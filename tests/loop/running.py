"""Runs of a few rounds on the tiny model: their recipe, their oracle, and what their folders hold."""

import contextlib
import json
import shutil
from pathlib import Path
from typing import Any

import yaml

from llmalign.cli import main
from llmalign.loop.stages import read_rows

#: in a file beside the recipe; the text with more vowels is likelier to be preferred, and every call is written down
ORACLE = """
import json, os

def log(name, *columns):
    if "ORACLE_LOG" in os.environ:
        with open(os.environ["ORACLE_LOG"], "a") as file:
            file.write(json.dumps([name, *columns]) + "\\n")

def vowels(text):
    return sum(text.lower().count(letter) for letter in "aeiou") + len(text) / 100

def preferred(prompts, first, second, **columns):
    if "No." not in [*first, *second]:  # what a run tries its oracle on, in both orders, before it begins
        log("preferred", prompts, first, second)
    gaps = [vowels(a) - vowels(b) for a, b in zip(first, second)]
    return [0.5 if gap == 0 else 0.9 if gap > 0 else 0.1 for gap in gaps]

def reward(prompts, completions, **columns):
    log("reward", prompts, completions)
    texts = [one if isinstance(one, str) else one[0]["content"] for one in completions]
    return [vowels(text) for text in texts]

def raises(prompts, first, second):
    raise KeyError("no such word")

def short(prompts, first, second):
    return [0.5]

def beyond(prompts, first, second):
    return [1.5 for _ in prompts]

def sometimes(prompts, first, second):
    return [float("nan") if len(a) > len(b) else p for a, b, p in zip(first, second, preferred(prompts, first, second))]
"""
#: the results of stages: the same bytes, however often a run was stopped
RESULTS = ("samples.jsonl", "judged.jsonl", "pairs.jsonl", "rows.jsonl", "*.safetensors", "*config.json")
WORDS = ("river", "boat", "soup", "letter", "morning", "answer", "question")
SMALLEST = {
    "method": "inpo", "eta": 0.1, "rounds": 2, "prompts_per_round": 4, "samples_per_prompt": 4, "eval_prompts": 3,
    "eval_samples": 2, "max_new_tokens": 6, "shard_prompts": 2, "max_length": 48, "per_device_train_batch_size": 2,
    "num_train_epochs": 2, "learning_rate": 1e-3, "save_steps": 2, "logging_steps": 4, "report_to": "none",
    "disable_tqdm": True,
}  # fmt: skip
BY_FUNCTION = {"oracle": "preference_function", "preference_function": "oracle.py:preferred"}
BY_REWARD = {"oracle": "reward", "reward_funcs": ["oracle.py:reward"]}


def prompts(count: int, *, talk: bool = False) -> list[dict[str, Any]]:
    """So many different prompts, of different lengths."""
    texts = [f"Say a word about the {WORDS[n % 7]}{' and more' * (n % 3)} {n}." for n in range(count)]
    return [{"prompt": [{"role": "user", "content": text}] if talk else text} for text in texts]


class Bench:
    """A folder with a model, prompts, an oracle, a recipe and the output folder of its run.

    The recipe names all of them relative to the folder, in which the command runs, so that two benches write the same.
    """

    def __init__(self, folder: Path, model: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.model = folder, folder / "model"
        self.recipe_file, self.output = folder / "recipe.yaml", folder / "out"
        shutil.copytree(model, self.model)
        (folder / "oracle.py").write_text(ORACLE)
        self.write_prompts(prompts(12))
        self.write()

    def write_prompts(self, rows: list[dict[str, Any]]) -> None:
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (self.folder / "prompts.jsonl").write_text(text, encoding="utf-8")

    def write(self, **keys: Any) -> None:
        """The recipe: the smallest one with these keys besides or instead; None leaves one out."""
        own = {"model_name_or_path": "model", "dataset_name": "prompts.jsonl", "output_dir": self.output.name}
        recipe = {**own, **SMALLEST, **({} if "oracle" in keys else BY_FUNCTION), **keys}
        recipe = {key: value for key, value in recipe.items() if value is not None}
        self.recipe_file.write_text(yaml.safe_dump(recipe))

    def iterate(self, *overrides: str) -> int:
        with contextlib.chdir(self.folder):
            return main(["iterate", self.recipe_file.name, *overrides])

    def run(self, *overrides: str) -> dict[str, Any]:
        """A run that comes to its end, and what it measured."""
        assert self.iterate(*overrides) == 0
        return json.loads((self.output / "rounds.json").read_text())

    def rows(self, number: int, stage: str, name: str) -> list[dict[str, Any]]:
        return list(read_rows(self.output / f"round-{number}" / stage / name))

    def manifest(self, number: int, stage: str) -> dict[str, Any]:
        return json.loads((self.output / f"round-{number}" / stage / "manifest.json").read_text())


def results(output: Path) -> dict[str, bytes]:
    """The bytes of every result of a run, by its path in the output folder."""
    found = {path for pattern in RESULTS for path in output.glob(f"round-*/*/{pattern}")}
    found |= {output / name for name in ("rounds.json",) if (output / name).is_file()}
    return {str(path.relative_to(output)): path.read_bytes() for path in sorted(found)}


def everything(output: Path) -> dict[str, bytes]:
    """The bytes of every file."""
    return {str(path.relative_to(output)): path.read_bytes() for path in sorted(output.rglob("*")) if path.is_file()}
