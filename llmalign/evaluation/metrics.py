"""The project's measures as `evaluate` metrics, without a network: `WinRate().compute(predictions=...)`."""

from typing import Any

import evaluate
from datasets import Features, Value

from llmalign.evaluation.alpaca import summarize
from llmalign.evaluation.constants import Constants, load_constants
from llmalign.evaluation.diversity import distinct_n
from llmalign.evaluation.winrate import bootstrap_mean, win_rate

_JUDGED = {
    "preference": Value("float64"), "instruction": Value("string"), "output_1": Value("string"),
    "output_2": Value("string"),
}  # fmt: skip


class WinRate(evaluate.Metric):
    """Share of comparisons won: `predictions` are P(the model wins) in [0, 1], a tie .5, and `references` prompt ids.

    Gives win_rate, low, high (95 %, whole prompts drawn), wins, losses, ties and n. Raises ValueError as
    `llmalign.evaluation.win_rate` does.
    """

    def _info(self) -> evaluate.MetricInfo:
        features = Features({"predictions": Value("float64"), "references": Value("string")})
        return _info(self, "References are prompt ids: several comparisons of a prompt are drawn together.", features)

    def _compute(self, predictions: list[float], references: list[str]) -> dict[str, Any]:
        found = win_rate(predictions, references)
        counts = {"wins": found.wins, "losses": found.losses, "ties": found.ties, "n": found.n}
        return {"win_rate": found.rate, "low": found.low, "high": found.high, **counts}


class LengthControlledWinRate(evaluate.Metric):
    """AlpacaEval's win rates in percent: `predictions` are preferences in [1, 2], with instruction and both outputs.

    `constants` is a path, None for the Hub's, or False to control length without difficulties. Gives what
    `llmalign.evaluation.alpaca.summarize` does.
    """

    def __init__(self, constants: str | Constants | bool | None = None, **options: Any) -> None:
        super().__init__(**options)
        self._constants = constants

    def _info(self) -> evaluate.MetricInfo:
        features = Features({"predictions" if name == "preference" else name: kind for name, kind in _JUDGED.items()})
        return _info(self, "Predictions are preferences: 1 where output_1 wins, 2 where output_2 does.", features)

    def _compute(
        self, predictions: list[float], instruction: list[str], output_1: list[str], output_2: list[str]
    ) -> dict[str, Any]:
        names = ("preference", "instruction", "output_1", "output_2")
        rows = [
            dict(zip(names, row, strict=True)) for row in zip(predictions, instruction, output_1, output_2, strict=True)
        ]
        return summarize(rows, constants=self._loaded()).as_dict()

    def _loaded(self) -> Constants | None:
        if isinstance(self._constants, Constants):
            return self._constants
        return None if self._constants is False else load_constants(self._constants or None)  # type: ignore[arg-type]


class PreferenceAccuracy(evaluate.Metric):
    """Share of pairs whose chosen response scores above the rejected one: `predictions` and `references` are scores.

    Predictions are the chosen responses' scores (log-probabilities or rewards), references the rejected ones'; a tie
    counts one half. Gives accuracy, its 95 % bootstrap interval, and n.
    """

    def _info(self) -> evaluate.MetricInfo:
        features = Features({"predictions": Value("float64"), "references": Value("float64")})
        return _info(self, "Predictions are scores of chosen responses, references those of rejected ones.", features)

    def _compute(self, predictions: list[float], references: list[float]) -> dict[str, Any]:
        right = [float(own > other) + 0.5 * (own == other) for own, other in zip(predictions, references, strict=True)]
        found = bootstrap_mean(right)
        return {"accuracy": found.mean, "low": found.low, "high": found.high, "n": found.n}


class DistinctN(evaluate.Metric):
    """Distinct n-grams over all n-grams of texts (`predictions`): 1 where nothing is repeated. `n` is 2 by default."""

    def _info(self) -> evaluate.MetricInfo:
        return _info(
            self, "Predictions are texts, words split at white space.", Features({"predictions": Value("string")})
        )

    def _compute(self, predictions: list[str], n: int = 2) -> dict[str, Any]:
        return {f"distinct_{n}": distinct_n([text.split() for text in predictions], n)}


def _info(metric: evaluate.Metric, inputs: str, features: Features) -> evaluate.MetricInfo:
    return evaluate.MetricInfo(
        description=type(metric).__doc__ or "", citation="", inputs_description=inputs, features=features
    )


__all__ = ["DistinctN", "LengthControlledWinRate", "PreferenceAccuracy", "WinRate"]
