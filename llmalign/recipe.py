"""A recipe: one YAML file that names a method, a model, data and any field of the method's config."""

import dataclasses
import difflib
import logging
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_type_hints

import yaml

from llmalign import assets
from llmalign.data.doctor import Limits
from llmalign.data.formats import DataSource, parse_sources
from llmalign.data.image_doctor import ImageLimits
from llmalign.data.report import Shares
from llmalign.errors import UserError
from llmalign.methods import METHODS, Method
from llmalign.refusals import refusals
from llmalign.trainers.loading import ModelConfig
from llmalign.values import convert, parse_text

logger = logging.getLogger(__name__)

# What describes one particular data set: it goes when another is named on the command line.
DATA_DESCRIPTION = (
    "dataset_config", "dataset_revision", "dataset_train_split", "dataset_test_split", "eval_datasets", "columns",
    "where",
)  # fmt: skip
RPO_ALPHA = (
    "`rpo_alpha` is not RPO's eta: what TRL called rpo_alpha is a length-normalised SFT term (arXiv 2404.19733), here "
    "`method: pair` with `loss: irpo` and `alpha: ...`; for RPO (arXiv 2405.16436) use `method: rpo` with `eta: ...`."
)
ITERATE_KEY = "oracle"
RESUME_KEY = "`resume_from_checkpoint` is not a recipe key: start again with `--resume auto` or `--resume PATH`."


@dataclass(frozen=True)
class DataSection:
    """The data keys of a recipe; `columns`, `where`, `max_rows` and the Hub keys apply to `dataset_name` given as text.

    A mapping or a (weighted) list under `dataset_name` says these per source instead.
    """

    dataset_name: str | dict | list | None = None
    dataset_config: str | None = None
    dataset_revision: str | None = None
    dataset_train_split: str | None = None
    dataset_test_split: str | None = None
    eval_datasets: dict | None = None
    columns: dict | None = None
    where: dict | None = None
    max_rows: int | None = None
    streaming: bool = False
    holdout_rows: int = 0  # taken from the training rows where no evaluation set is named
    overlong: Literal["keep", "drop"] = "keep"

    def train_sources(self) -> list[DataSource]:
        """What to train on. Raises UserError when the recipe names no data."""
        return self._sources(self.dataset_train_split)

    def eval_sources(self) -> dict[str, list[DataSource]]:
        """Evaluation sets by name; `dataset_test_split` alone is the set called `test`."""
        named = {name: parse_sources(value) for name, value in (self.eval_datasets or {}).items()}
        if "train" in named:
            raise UserError("An evaluation set cannot be called `train`: give it another name in `eval_datasets`.")
        if self.dataset_test_split is None:
            return named
        if "test" in named:
            raise UserError("`dataset_test_split` and `eval_datasets: {test: ...}` both name the set `test`; keep one.")
        return {"test": self._sources(self.dataset_test_split), **named}

    def _sources(self, split: str | None) -> list[DataSource]:
        shared = {
            "split": split,
            "config": self.dataset_config,
            "revision": self.dataset_revision,
            "columns": self.columns,
            "where": self.where,
            "max_rows": self.max_rows,
        }
        if self.dataset_name is None:
            raise UserError(
                "The recipe names no data: set `dataset_name` to a file, a folder, a Hub name or sample:pairs."
            )
        given = {key: value for key, value in shared.items() if value is not None}
        if isinstance(self.dataset_name, str):
            return parse_sources({"path": self.dataset_name, **given})
        if given:
            raise UserError(
                f"`{next(iter(given))}` stands beside a `dataset_name` that is a list or a mapping; write it inside "
                "each source."
            )
        return parse_sources(self.dataset_name)


@dataclass(frozen=True)
class Recipe:
    """A checked recipe: every key known and typed; nothing has been loaded yet."""

    path: str
    method: Method
    data: DataSection
    limits: Shares
    model: dict[str, Any] = field(default_factory=dict)  # the fields of ModelConfig that are set
    config: dict[str, Any] = field(default_factory=dict)  # the fields of the method's config that are set
    overridden: frozenset[str] = frozenset()  # the keys that the command line gave
    loop: dict[str, Any] = field(default_factory=dict)  # the keys of `llmalign iterate` that are set

    def blame(self, error: Exception) -> str:
        """The error's sentence after where the value came from: the command line, if that gave a key it names."""
        named = set(re.findall(r"\w+", str(error)))
        if named & self.overridden:
            return f"the command line: {error}"
        known = {entry.name for owner in (self.method.config, ModelConfig) for entry in dataclasses.fields(owner)}
        return f"{self.path}: {error}" if named & known or not isinstance(error, UserError) else str(error)

    def training_config(self) -> Any:
        """The method's config object. Raises UserError with the config's own sentence when a value is out of range."""
        with refusals(self.blame, "the config could not be made"):
            try:
                return self.method.config(**self.config)
            except UserError as error:
                raise UserError(self.blame(error)) from error

    def model_config(self) -> ModelConfig:
        """TRL's ModelConfig. Raises UserError when the recipe names no model or contradicts itself."""
        quantized = self.model.get("load_in_4bit") or self.model.get("load_in_8bit")
        if quantized and not self.model.get("use_peft"):
            raise UserError(
                self.blame(UserError("load_in_4bit and load_in_8bit train an adapter only; set `use_peft: true`."))
            )
        if not self.model.get("model_name_or_path"):
            raise UserError(
                f"{self.path} names no model: set `model_name_or_path` to a folder, a Hub name or embedded:tiny."
            )
        with refusals(self.blame, "the model's options cannot be used"):
            return ModelConfig(**self.model)


def load_recipe(path: str | Path, overrides: Sequence[str] = (), *, loop: type | None = None) -> Recipe:
    """Read a recipe file, or a shipped one such as `trainers/rpo/recipe.yaml`, and apply `--key value` overrides.

    `loop` is the dataclass of the keys that `llmalign iterate` knows besides. Raises UserError naming the file and the
    key for anything that is not understood.
    """
    found = find_recipe(path)
    given = read_yaml(found)
    if loop is None and ITERATE_KEY in given:
        raise UserError(f"{path} names an oracle, so it is a recipe of several rounds: llmalign iterate {path}")
    given_overrides = parse_overrides(overrides)
    if given_overrides.get("dataset_name", given.get("dataset_name")) != given.get("dataset_name"):
        given = _without_its_data(given)
    overridden = frozenset(given_overrides)
    method = _method(
        "the command line" if "method" in overridden else str(path),
        given_overrides.pop("method", given.pop("method", None)),
    )
    sections: dict[str, dict[str, Any]] = {
        "data": get_type_hints(DataSection),
        "limits": _limit_hints(limits_of(method)),
        "model": _init_hints(ModelConfig),
        "config": _init_hints(method.config),
        "loop": {} if loop is None else _init_hints(loop),
    }
    choices = {
        entry.name: entry.metadata["choices"]
        for owner in (ModelConfig, method.config)
        for entry in dataclasses.fields(owner)
        if "choices" in entry.metadata
    }
    values: dict[str, dict[str, Any]] = {name: {} for name in sections}
    for source, raw in ((str(path), given), ("the command line", given_overrides)):
        for key, value in raw.items():
            section = _section_of(key, sections, source)
            make = parse_text if raw is given_overrides else convert
            try:
                typed = make(key, value, sections[section][key])
                _check_choice(key, typed, choices.get(key))
            except UserError as error:
                raise UserError(f"{source}: {error}") from error
            values[section][key] = typed
    return Recipe(
        path=str(path),
        method=method,
        data=DataSection(**values["data"]),
        limits=_limits(limits_of(method), values["limits"]),
        model=values["model"],
        config={"output_dir": f"runs/{method.name}", **values["config"]},
        overridden=overridden,
        loop=values["loop"],
    )


def find_recipe(path: str | Path) -> Path:
    """The file at `path`, else the shipped file of that name. Raises UserError when there is neither."""
    if Path(path).is_file():
        return Path(path)
    shipped = assets.root() / path
    if shipped.is_file():
        return shipped
    known = sorted(str(p.relative_to(assets.root())) for p in (assets.root() / "trainers").glob("*/*.yaml"))
    raise UserError(f"There is no recipe {path}, here or shipped; the nearest shipped is {nearest(str(path), known)}.")


class _StrictLoader(yaml.SafeLoader):
    """SafeLoader that refuses a key given twice, where YAML would keep the last without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            if key_node.value in seen and key_node.value != "<<":
                raise UserError(f"`{key_node.value}` is given twice (line {key_node.start_mark.line + 1}).")
            seen.add(key_node.value)
        return super().construct_mapping(node, deep=deep)


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file, read with the safe loader. Raises UserError for anything else."""
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=_StrictLoader)
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not a text file in UTF-8.") from error
    except yaml.YAMLError as error:
        where = " ".join(str(error).split())
        raise UserError(f"{path} is not valid YAML: {where}") from error
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} must hold `key: value` lines, found {type(content).__name__}.")
    unnamed = [key for key in content if not isinstance(key, str)]
    if unnamed:
        raise UserError(f"{path}: the key {unnamed[0]!r} is not text; quote it.")
    return content


def parse_overrides(arguments: Sequence[str]) -> dict[str, str]:
    """`--key value`, `--key=value` and a bare `--key` (true) as raw text by key, hyphens read as underscores.

    Raises UserError for a word that belongs to no key and for a key given twice.
    """
    found: dict[str, str] = {}
    position = 0
    while position < len(arguments):
        word = arguments[position]
        if not word.startswith("--") or len(word) < 3:
            raise UserError(f"{word!r} is not understood: overrides are written --key value.")
        key, equals, value = word[2:].partition("=")
        position += 1
        if not equals:
            has_value = position < len(arguments) and not arguments[position].startswith("--")
            value = arguments[position] if has_value else "true"
            position += has_value
        key = key.replace("-", "_")
        if key in found:
            raise UserError(f"--{key} is given twice on the command line.")
        found[key] = value
    return found


def nearest(name: str, known: Sequence[str]) -> str:
    """The known name most like `name`; a shared beginning counts for more than what follows."""

    def likeness(candidate: str) -> float:
        ratio = difflib.SequenceMatcher(None, name, candidate).ratio()
        shared = min(len(os.path.commonprefix([name, candidate])), 6)
        return ratio + 0.1 * shared * (1 - ratio)

    return max(known, key=likeness)


def doctor_options(data: str, arguments: Sequence[str], limits: type[Shares] = Limits) -> tuple[DataSource, Any]:
    """A data set and limits from a command line: any key of a source (`--split test`) and any `--max_...` limit.

    Raises UserError for an unknown key, naming the nearest.
    """
    source_hints = {key: hint for key, hint in get_type_hints(DataSource).items() if key not in ("path", "weight")}
    sections = {"source": source_hints, "limits": _limit_hints(limits)}
    values: dict[str, dict[str, Any]] = {name: {} for name in sections}
    for key, text in parse_overrides(arguments).items():
        section = _section_of(key, sections, "the command line")
        values[section][key] = parse_text(key, text, sections[section][key])
    (source,) = parse_sources({"path": data, **values["source"]})
    return source, _limits(limits, values["limits"])


def limits_of(method: Method) -> type[Shares]:
    """What the doctor allows in the rows that a method reads."""
    return ImageLimits if method.of_images else Limits


def limit_keys() -> list[str]:
    """The recipe keys of the doctor's limits."""
    return [*_limit_hints(Limits), *_limit_hints(ImageLimits)]


def _limit_hints(limits: type[Shares]) -> dict[str, Any]:
    return {f"max_{name}": hint for name, hint in get_type_hints(limits).items()}


def _limits(limits: type[Shares], values: dict[str, float]) -> Shares:
    return limits(**{key.removeprefix("max_"): value for key, value in values.items()})


def _without_its_data(given: dict[str, Any]) -> dict[str, Any]:
    """A recipe without what describes its own data: another `dataset_name` was given on the command line."""
    dropped = [key for key in DATA_DESCRIPTION if key in given]
    if dropped:
        logger.info("--dataset_name replaces the recipe's data, and with it: %s.", ", ".join(dropped))
    return {key: value for key, value in given.items() if key not in DATA_DESCRIPTION}


def _method(path: str, name: Any) -> Method:
    if name is None:
        raise UserError(f"{path} names no method: set `method` to one of {', '.join(METHODS)}.")
    if not isinstance(name, str) or name not in METHODS:
        raise UserError(
            f"{path}: unknown method {name!r}; the nearest is {nearest(str(name), list(METHODS))}, and all are "
            f"{', '.join(METHODS)}."
        )
    return METHODS[name]


def _section_of(key: str, sections: dict[str, dict[str, Any]], source: str) -> str:
    if key == "rpo_alpha":
        raise UserError(f"{source}: {RPO_ALPHA}")
    if key == "resume_from_checkpoint":
        raise UserError(f"{source}: {RESUME_KEY}")
    owners = [name for name, hints in sections.items() if key in hints]
    if not owners:
        known = sorted({"method"}.union(*sections.values()))
        raise UserError(f"{source}: unknown key `{key}`; the nearest is `{nearest(key, known)}`.")
    return owners[0]


def _check_choice(key: str, value: Any, choices: Sequence[Any] | None) -> None:
    if choices is not None and isinstance(value, str) and value not in choices:
        raise UserError(f"`{key}` takes {', '.join(map(str, choices))}; got {value!r}.")


def _init_hints(config: type) -> dict[str, Any]:
    hints = get_type_hints(config)
    return {item.name: hints[item.name] for item in dataclasses.fields(config) if item.init}
