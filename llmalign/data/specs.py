"""Where the rows come from: a `DataSource` for each data set, and the shipped specs in `data/*.yaml`."""

import dataclasses
import difflib
import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import yaml

from llmalign import assets
from llmalign.errors import UserError

SPEC_PREFIX = "spec:"
SPEC_KEYS = ("about", "source", "config", "revision", "split", "columns", "where", "licence")


@dataclass(frozen=True)
class DataSource:
    """One data set and how to read it.

    path: a file (.jsonl .json .csv, each also .gz, or .parquet), a folder of such files or one made by `save_to_disk`,
    a Hub name, `sample:NAME` (a file in `data/samples`), or `spec:NAME` (`data/NAME.yaml`, by way of
    `parse_sources`).
    split: of a folder or a Hub name, `train` when None. config, revision: of a Hub name.
    weight: share of the rows in a mix; None in all sources of a list means all rows of all of them.
    columns: what llmalign calls a column -> what the source calls it. `outputs.score` reaches into a list of mappings
    or a mapping, a list of names makes a list, null means: do not read a column of this name.
    where: keep the rows in which every named column equals the value (or one of a list of values).
    max_rows: the first that many rows, after `where`.

    Raises UserError when a value is of the wrong kind.
    """

    path: str
    split: str | None = None
    revision: str | None = None
    config: str | None = None
    weight: float | None = None
    columns: dict[str, Any] | None = None
    where: dict[str, Any] | None = None
    max_rows: int | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.path, str) or not self.path:
            raise UserError(f"`path` must be the name of a file, a folder or a Hub data set, got {self.path!r}.")
        for name in ("split", "revision", "config"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, str):
                raise UserError(f"`{name}` of {self.path} must be text, got {value!r}.")
        if self.weight is not None and not _is_positive(self.weight):
            raise UserError(f"`weight` of {self.path} must be a number above 0, got {self.weight!r}.")
        if self.max_rows is not None and (type(self.max_rows) is not int or self.max_rows < 1):
            raise UserError(f"`max_rows` of {self.path} must be a whole number of at least 1, got {self.max_rows!r}.")
        self._check_columns()
        self._check_where()

    def _check_columns(self) -> None:
        if self.columns is None:
            return
        if not isinstance(self.columns, dict):
            raise UserError(f"`columns` of {self.path} must map column names, got {self.columns!r}.")
        for target, source in self.columns.items():
            names = source if isinstance(source, list) and source else [source]
            if not isinstance(target, str) or not (source is None or all(isinstance(name, str) for name in names)):
                raise UserError(
                    f"`columns` of {self.path} must map a name to a name, a list of names or null, got "
                    f"{target!r}: {source!r}."
                )

    def _check_where(self) -> None:
        if self.where is not None and not (isinstance(self.where, dict) and all(map(_is_text, self.where))):
            raise UserError(f"`where` of {self.path} must map column names to values, got {self.where!r}.")


def parse_sources(value: str | dict[str, Any] | list[str | dict[str, Any]]) -> list[DataSource]:
    """Data sources from what a recipe says: a name, a mapping with the fields of `DataSource`, or a list of these.

    `spec:NAME` takes its fields from `data/NAME.yaml`; fields given beside it replace the spec's. Raises UserError for
    an unknown key (naming the nearest), an unknown spec, an empty list, or a list in which only some have a weight.
    """
    items = value if isinstance(value, list) else [value]
    if not items:
        raise UserError("The list of data sets is empty; name at least one.")
    sources = [_parse_one(item) for item in items]
    weighted = [source.weight is not None for source in sources]
    if any(weighted) and not all(weighted):
        lacking = sources[weighted.index(False)].path
        raise UserError(f"{lacking} has no `weight`, others in the list have one; give a weight to all or to none.")
    return sources


def _parse_one(item: Any) -> DataSource:
    fields = {"path": item} if isinstance(item, str) else item
    if not isinstance(fields, dict):
        raise UserError(f"A data set is named by text or by a mapping with `path`, got {item!r}.")
    check_keys(fields, [field.name for field in dataclasses.fields(DataSource)], "A data set")
    if "path" not in fields:
        raise UserError(f"A data set has no `path`: {fields!r}.")
    path = fields["path"]
    if isinstance(path, str) and path.startswith(SPEC_PREFIX):
        fields = {**_spec_fields(path.removeprefix(SPEC_PREFIX)), **fields}
        fields["path"] = fields.pop("source")
    return DataSource(**fields)


def _spec_fields(name: str) -> dict[str, Any]:
    spec = read_spec(name)
    return {key: value for key, value in spec.items() if key not in ("about", "licence")}


def read_spec(name: str) -> dict[str, Any]:
    """The shipped spec `data/<name>.yaml` as a mapping with the keys of `SPEC_KEYS`.

    Raises UserError when there is no such spec (naming the nearest), it has an unknown key, or lacks its source or
    licence.
    """
    folder = assets.root() / "data"
    known = sorted(path.stem for path in folder.glob("*.yaml"))
    if name not in known:
        raise UserError(f"There is no data spec {name!r}{_nearest(name, known)}; shipped are: {', '.join(known)}.")
    where = f"data/{name}.yaml"
    try:
        spec = yaml.safe_load((folder / f"{name}.yaml").read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise UserError(f"{where} is not valid YAML: {' '.join(str(error).split())}.") from error
    if not isinstance(spec, dict):
        raise UserError(f"{where} must be a mapping of keys to values.")
    check_keys(spec, SPEC_KEYS, where)
    for key in ("source", "licence"):
        if not isinstance(spec.get(key), str):
            raise UserError(f"{where} must say its `{key}` as text.")
    return spec


def check_keys(given: Collection[Any], known: Collection[str], owner: str) -> None:
    """Raise UserError naming the first key of `given` that is not in `known`, and the known key nearest to it."""
    for key in given:
        if key not in known:
            hint = _nearest(str(key), known)
            raise UserError(f"{owner} has an unknown key {key!r}{hint}; known are: {', '.join(known)}.")


def _nearest(name: str, known: Collection[str]) -> str:
    close = difflib.get_close_matches(name, list(known), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def _is_positive(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value) and value > 0


def _is_text(value: Any) -> bool:
    return isinstance(value, str)
