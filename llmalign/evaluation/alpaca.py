"""AlpacaEval's numbers from annotations: raw, discrete and length-controlled win rates, and the rows they rest on."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np

from llmalign.errors import UserError
from llmalign.evaluation.annotations import Row, generators, known_preference
from llmalign.evaluation.constants import Constants, instruction_index
from llmalign.evaluation.length_control import FOLDS, LengthControl, control_length, length_feature
from llmalign.evaluation.winrate import Estimate, bootstrap_mean, paired_difference

Alignment = Literal["instruction", "position"]
ALIGNMENTS = ("instruction", "position")
RATES = ("win_rate", "standard_error", "discrete_win_rate", "length_controlled_winrate", "lc_standard_error")
FAR = 10.0  # points between raw and length-controlled win rate that are worth a word


@dataclass(frozen=True)
class Summary:
    """What one file of annotations says; rates and errors in percent, None where nothing can be said.

    The fields up to `lc_standard_error` are the leaderboard's columns. `n_rows`: rows that the win rate rests on,
    `interval`: its 95 % interval, whole prompts drawn. `warnings`: a sentence for all that was left out or assumed.
    """

    win_rate: float | None
    standard_error: float | None
    mode: str
    avg_length: int
    n_wins: int
    n_wins_base: int
    n_draws: int
    n_total: int
    discrete_win_rate: float | None
    length_controlled_winrate: float | None
    lc_standard_error: float | None
    n_rows: int
    generator_1: str | None
    generator_2: str | None
    interval: Estimate | None = None
    per_dataset: list[dict[str, Any]] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """All of it as JSON has it."""
        return asdict(self)


def summarize(
    rows: Sequence[Row],
    *,
    constants: Constants | None = None,
    alignment: Alignment = "instruction",
    mode: str = "community",
) -> Summary:
    """AlpacaEval's definitions on N annotations (`read_annotations`), preference 2 where output_2, the model's, wins.

    win_rate = 100 mean(p - 1), its error 100 sem (ddof 1); discrete: p rounded, a tie one half. A preference of null,
    NaN, -1 or anything outside [1, 2] leaves its row out; 0 is an old tie. `constants` hold AlpacaEval's difficulties,
    looked up by instruction or, as in the published numbers, by position in the file; without them, and for other
    prompts, length is controlled without difficulty. Raises UserError for rows of several models, and for an unknown
    alignment.
    """
    if alignment not in ALIGNMENTS:
        raise UserError(f"difficulties are looked up by {' or '.join(ALIGNMENTS)}, not by {alignment!r}")
    warnings: list[str] = []
    first, second = _two_models(rows)
    known = [(row, p) for row in rows if (p := known_preference(row["preference"])) is not None]
    _say_dropped(rows, known, warnings)
    _say_repeated([row for row, _ in known], warnings)
    if first is not None and first == second:
        warnings.append(f"both sides are called {first}: which is which is known by their places alone")
    counts = {
        "mode": mode,
        "avg_length": int(np.mean([len(row["output_2"]) for row in rows])) if rows else 0,
        "n_wins": sum(p > 1.5 for _, p in known),
        "n_wins_base": sum(p < 1.5 for _, p in known),
        "n_draws": sum(p == 1.5 for _, p in known),
        "n_total": len(known),
        "n_rows": len(known),
        "generator_1": first,
        "generator_2": second,
    }
    if not known:
        warnings.append("there is no row with a preference, so nothing can be said of a win rate")
        return Summary(**dict.fromkeys(RATES), **counts, warnings=warnings)  # type: ignore[arg-type]
    wins = np.array([p for _, p in known]) - 1
    discrete = np.where(wins == 0.5, 0.5, np.round(wins))
    if len(known) == 1:
        warnings.append("there is one row, so nothing can be said of the standard error")
    controlled = _controlled(rows, constants, alignment, warnings)
    win_rate = 100 * float(wins.mean())
    if controlled[0] is not None and abs(controlled[0] - win_rate) > FAR:
        warnings.append(
            f"the length-controlled win rate, {controlled[0]:.1f}, is far from the raw one, {win_rate:.1f}: outputs "
            "differ much in length"
        )
    return Summary(
        win_rate=win_rate,
        standard_error=_error(wins),
        discrete_win_rate=100 * float(discrete.mean()),
        length_controlled_winrate=controlled[0],
        lc_standard_error=controlled[1],
        interval=_in_percent(bootstrap_mean(wins.tolist(), [_instruction(row) for row, _ in known])),
        per_dataset=_per_dataset(known),
        warnings=warnings,
        **counts,  # type: ignore[arg-type]
    )


def compare(rows: Sequence[Row], others: Sequence[Row]) -> Estimate:
    """Win rate of one model's annotations minus another's, in points, over the instructions that both have judged.

    A paired bootstrap: whole instructions are drawn, with the rows of both. Raises UserError where the two share none.
    """
    own, their = _by_instruction(rows), _by_instruction(others)
    shared = [instruction for instruction in own if instruction in their]
    if not shared:
        raise UserError("the two files share no judged instruction, so there is nothing to compare")
    first, second = ([float(np.mean(side[name])) for name in shared] for side in (own, their))
    return _in_percent(paired_difference(first, second))


def _by_instruction(rows: Sequence[Row]) -> dict[Any, list[float]]:
    found: dict[Any, list[float]] = {}
    for row in rows:
        p = known_preference(row["preference"])
        if p is not None:
            found.setdefault(_instruction(row), []).append(p - 1)
    return found


def _instruction(row: Row) -> str | int:
    """What stands for a row's instruction: AlpacaEval's number of it, else its text."""
    number = instruction_index(row)
    return str(row["instruction"]) if number is None else number


def _two_models(rows: Sequence[Row]) -> tuple[str | None, str | None]:
    for side in (1, 2):
        names = sorted({str(row[f"generator_{side}"]) for row in rows if row.get(f"generator_{side}") is not None})
        if len(names) > 1:
            raise UserError(
                f"the annotations are of several models ({', '.join(names[:3])} in generator_{side}); give each model "
                "a file of its own"
            )
    return generators(rows) if rows else (None, None)


def _say_dropped(rows: Sequence[Row], known: list[tuple[Row, float]], warnings: list[str]) -> None:
    dropped = len(rows) - len(known)
    if dropped:
        shown = Counter(_kind(row["preference"]) for row in rows if known_preference(row["preference"]) is None)
        kinds = ", ".join(f"{count} {kind}" for kind, count in shown.items())
        warnings.append(f"{dropped} of {len(rows)} rows have no preference that counts ({kinds}) and are left out")


def _kind(value: float | None) -> str:
    if value is None:
        return "null"
    if math.isnan(value):
        return "NaN"
    return "-1" if value == -1 else "outside 1 to 2"


def _say_repeated(rows: Sequence[Row], warnings: list[str]) -> None:
    counts = Counter(_instruction(row) for row in rows)
    repeated = sum(count - 1 for count in counts.values())
    if repeated:
        warnings.append(
            f"{repeated} rows repeat an instruction; all of them count, and intervals draw whole instructions"
        )


def _controlled(
    rows: Sequence[Row],
    constants: Constants | None,
    alignment: Alignment,
    warnings: list[str],
) -> tuple[float | None, float | None]:
    """The length-controlled win rate and its error; the baseline against itself is 50."""
    if all(row["output_1"] == row["output_2"] for row in rows):
        return 50.0, 0.0
    if constants is None:
        theirs = any(instruction_index(row) is not None for row in rows)
        why = "AlpacaEval's constants are not at hand" if theirs else "the instructions are not AlpacaEval's"
        return _mean_and_error(_without_difficulty(rows, why, warnings))
    places = _places(rows, alignment, warnings)
    kept = [(row, place) for row, place in zip(rows, places, strict=True) if place is not None]
    if not kept:
        return _mean_and_error(_without_difficulty(rows, "the instructions are not AlpacaEval's", warnings))
    if len(kept) < len(rows):
        warnings.append(
            f"{len(rows) - len(kept)} rows have instructions that AlpacaEval does not know: the length-controlled win "
            f"rate rests on the other {len(kept)}"
        )
    return _mean_and_error(_fitted([row for row, _ in kept], constants, [place for _, place in kept], warnings))


def _places(rows: Sequence[Row], alignment: Alignment, warnings: list[str]) -> list[int | None]:
    """Each row's number among AlpacaEval's instructions."""
    if alignment == "instruction":
        return [instruction_index(row) for row in rows]
    count = len(instruction_index.known)
    if len(rows) < count:
        warnings.append(
            f"difficulties are looked up by position, and the file has {len(rows)} rows of {count}: they belong to "
            "other instructions from the first missing one on"
        )
    return [place if place < count else None for place in range(len(rows))]


def _without_difficulty(rows: Sequence[Row], why: str, warnings: list[str]) -> LengthControl | None:
    fitted = _fitted(rows, None, [], warnings)
    if fitted is not None:
        warnings.append(
            f"{why}, so length is controlled without difficulty, on these rows alone: such a rate is not comparable "
            "with the published ones"
        )
    return fitted


def _fitted(
    rows: Sequence[Row], constants: Constants | None, places: list[int], warnings: list[str]
) -> LengthControl | None:
    first, second = (np.array([len(row[f"output_{side}"]) for row in rows], dtype=float) for side in (1, 2))
    found = [known_preference(row["preference"]) for row in rows]
    preferences = np.array([math.nan if p is None else p - 1 for p in found])
    judged = int((~np.isnan(preferences)).sum())
    if judged < FOLDS:
        warnings.append(f"the length-controlled win rate needs at least {FOLDS} judged rows, not {judged}")
        return None
    lengths = length_feature(first, second)
    if constants is None:
        return control_length(lengths, preferences)
    return control_length(lengths, preferences, constants.difficulty[places], constants.gamed)


def _mean_and_error(fitted: LengthControl | None) -> tuple[float | None, float | None]:
    if fitted is None:
        return None, None
    # Without difficulties all predictions are the same number, whose spread says nothing of its error.
    error = None if fitted.difficulty is None else _error(fitted.preferences)
    return 100 * float(fitted.preferences.mean()), error


def _error(values: Any) -> float | None:
    """100 sem with ddof 1; None for one value."""
    return 100 * float(values.std(ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else None


def _in_percent(estimate: Estimate) -> Estimate:
    return Estimate(100 * estimate.mean, 100 * estimate.low, 100 * estimate.high, estimate.n)


def _per_dataset(known: list[tuple[Row, float]]) -> list[dict[str, Any]]:
    groups: dict[str, list[float]] = {}
    for row, p in known:
        if row.get("dataset") is not None:
            groups.setdefault(str(row["dataset"]), []).append(p - 1)
    return [
        {"dataset": name, "n": len(values), "win_rate": 100 * float(np.mean(values)),
         "standard_error": _error(np.array(values))}
        for name, values in sorted(groups.items())
    ]  # fmt: skip
