"""rDPO, DPO, cDPO and IPO on preference pairs of which a known share has its label flipped.

Few pairs are passed over several times: that is where a loss can learn the flipped labels by heart.
"""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from claims import start, world
from claims.cells import Cell, Result, Store
from claims.report import Claim, Figure, Interval, Outcome, interval, values
from llmalign import PairConfig, PairTrainer, RDPOConfig, RDPOTrainer
from llmalign.embedded.grammar import split
from llmalign.embedded.rows import pair_rows

METHODS = ("rdpo", "dpo", "cdpo", "ipo")
LABELS: dict[str, dict[str, Any]] = {
    "rDPO": {"method": "rdpo", "beta": 0.5},
    "DPO": {"method": "dpo", "beta": 0.5},
    "cDPO": {"method": "cdpo", "beta": 0.5},
    "IPO": {"method": "ipo", "tau": 0.5},
    "DPO, beta .1": {"method": "dpo", "beta": 0.1},
}
WEAK = 0.1
RATES = (0.0, 0.2, 0.4)
SHAPE = {"pairs": 640, "margin": 2.0, "words": 28, "steps": 80, "every": 40, "batch": 16, "lr": 3e-4, "held_out": 400}
STRENGTH = {"rdpo": {"beta": 0.5}, "dpo": {"beta": 0.5}, "cdpo": {"beta": 0.5}, "ipo": {"tau": 0.5}}
SMOKE = {"pairs": 16, "steps": 2, "every": 1, "batch": 4, "held_out": 8, "smoke": True}


def draw(setting: dict[str, Any], seed: int, **more: Any) -> list[dict[str, Any]]:
    """Pairs at least `margin` apart in true score, of answers of at most `words` words: short ones, for speed."""

    def short(row: dict[str, Any]) -> bool:
        return max(len(row[side].split()) for side in ("chosen", "rejected")) <= setting["words"]

    count = more.pop("count")
    drawn = [row for row in pair_rows(4 * count, seed, min_margin=setting["margin"], **more) if short(row)]
    return drawn[:count]


def build_trainer(
    cell: Cell, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: str, **data: Any
) -> Any:
    """The project's trainer of the cell's method; every method has the same rows, order, steps and learning rate."""
    s = cell.setting
    shared = start.arguments(folder, steps=s["steps"], batch=s["batch"], lr=s["lr"], seed=cell.seed)
    shared["alarm_prompts"] = 0
    if cell.method == "rdpo":
        config = RDPOConfig(**shared, beta=s["beta"], flip_rate=s["flip_rate"])
        return RDPOTrainer(model=model, args=config, processing_class=tokenizer, **data)
    own = {"tau": s["tau"]} if cell.method == "ipo" else {"beta": s["beta"]}
    if cell.method == "cdpo":
        own["flip_rate"] = s["flip_rate"]
    return PairTrainer(
        model=model, args=PairConfig(**shared, loss=cell.method, **own), processing_class=tokenizer, **data
    )


def cells(smoke: bool) -> list[Cell]:
    """Without flips rDPO and cDPO are DPO, term by term: those cells are not run.

    With the most flips DPO is also run with a weaker reference, a second setting that a user may well pick.
    """
    if smoke:
        return [Cell("rdpo", m, 0, {**SHAPE, **STRENGTH[m], **SMOKE, "flip_rate": 0.4}) for m in ("rdpo", "dpo")]
    found = []
    for seed in (1, 2, 3):
        for rate in RATES:
            methods = METHODS if rate else ("dpo", "ipo")
            found += [Cell("rdpo", m, seed, {**SHAPE, **STRENGTH[m], "flip_rate": rate}) for m in methods]
        found.append(Cell("rdpo", "dpo", seed, {**SHAPE, "beta": WEAK, "flip_rate": max(RATES)}))
    return found


def experiment(cell: Cell, store: Store) -> Result:
    s = cell.setting
    model, tokenizer = world.load(start.start(store, start.SMOKE if s.get("smoke") else start.START))
    drawn = draw(s, cell.seed, count=s["pairs"], flip_rate=s["flip_rate"])
    rows = world.with_logps(model, world.prepared(drawn, tokenizer), "ref")
    unseen = world.prepared(draw(s, cell.seed, count=s["held_out"], subset=split()[1]), tokenizer)
    before = world.pair_logps(model, unseen)
    curve: dict[str, list[float]] = {"step": [0], "accuracy": [0.5], "drift": [0.0]}

    def look(policy: Any, step: int) -> None:
        chosen, rejected = (now - then for now, then in zip(world.pair_logps(policy, unseen), before, strict=True))
        curve["step"].append(step)
        curve["accuracy"].append(float((chosen > rejected).float().mean()))
        curve["drift"].append(float(chosen.mean()))

    with TemporaryDirectory() as scratch:
        data = {"train_dataset": Dataset.from_list(rows), "callbacks": [world.Watch(s["every"], look)]}
        trainer = build_trainer(cell, model, tokenizer, scratch, **data)
        start.train(trainer)
    chosen, rejected = world.pair_logps(model, rows)
    chosen -= torch.tensor([row["ref_chosen_logps"] for row in rows])
    rejected -= torch.tensor([row["ref_rejected_logps"] for row in rows])
    return {
        **curve,
        "flipped": sum(row["flipped"] for row in rows) / len(rows),
        "fitted": float((chosen > rejected).float().mean()),
        "final": curve["accuracy"][-1],
        "final_drift": curve["drift"][-1],
    }


def _report_accuracies(records: list[Result], label: str, rate: float) -> list[float]:
    # Without flips the three losses are one function, which DPO's cells have computed.
    where = LABELS["DPO" if rate == 0 and label in ("rDPO", "cDPO") else label]
    return values(records, "final", flip_rate=rate, **where)


def judge(records: list[Result]) -> Outcome:
    worst = max(RATES)
    rates = [rate for rate in RATES if _report_accuracies(records, "DPO", rate)]
    labels = [label for label, where in LABELS.items() if values(records, "final", flip_rate=worst, **where)]
    accuracy = {label: {rate: _report_accuracies(records, label, rate) for rate in rates} for label in labels}
    lead: dict[float, dict[str, Interval]] = {}
    for rate in (rate for rate in rates if rate):
        rivals = {label: by_rate[rate] for label, by_rate in accuracy.items() if label != "rDPO" and by_rate[rate]}
        own = accuracy["rDPO"][rate]
        lead[rate] = {k: interval([a - b for a, b in zip(own, v, strict=True)]) for k, v in rivals.items()}
    said = "; ".join(
        f"{rate:.0%} flipped: {', '.join(f'over {label} {found.text()}' for label, found in by_label.items())}"
        for rate, by_label in lead.items()
    )
    equals = [label for label in labels if label in ("DPO", "cDPO", "IPO")]

    def cell_text(label: str, rate: float) -> str:
        return interval(accuracy[label][rate]).text() if accuracy[label][rate] else ""

    return Outcome(
        holds=all(lead[worst][k].mean > 0 for k in equals) and lead[worst]["DPO"].low > 0,
        verdict=f"rDPO's lead in accuracy on clean held-out pairs, paired by seed. {said}.",
        columns=["method", *(f"{rate:.0%} flipped" for rate in rates), f"own labels fitted, {worst:.0%} flipped"],
        rows=[
            [label, *(cell_text(label, rate) for rate in rates)]
            + [interval(values(records, "fitted", flip_rate=worst, **LABELS[label])).text()]
            for label in labels
        ],
        numbers={
            "accuracy": {label: {str(r): v for r, v in by_rate.items()} for label, by_rate in accuracy.items()},
            "curves": {label: values(records, "accuracy", flip_rate=worst, **LABELS[label]) for label in labels},
            "chosen_drift": {
                label: values(records, "final_drift", flip_rate=worst, **LABELS[label]) for label in labels
            },
        },
        draw=lambda figure: _report_picture(figure, records, accuracy),
    )


def _report_picture(figure: Figure, records: list[Result], accuracy: dict[str, dict[float, list[float]]]) -> None:
    left, right = figure.subplots(1, 2)
    worst = max(RATES)
    for number, (label, by_rate) in enumerate(accuracy.items()):
        found = {100 * rate + 0.6 * (number - 2): interval(v) for rate, v in by_rate.items() if v}
        style = {"fmt": "o-", "capsize": 3, "color": f"C{number}", "label": label}
        left.errorbar(list(found), [i.mean for i in found.values()], [i.half for i in found.values()], **style)
        for run in values(records, "accuracy", flip_rate=worst, **LABELS[label]):
            right.plot(records[0]["result"]["step"], run, "o-", color=f"C{number}", lw=1, ms=3)
    left.set(xlabel="labels flipped (%)", ylabel="accuracy, clean held-out labels", title="After the last step")
    right.set(xlabel="step", title=f"{worst:.0%} flipped, over training, by seed")
    left.legend(fontsize=8)


CLAIM = Claim(
    name="rdpo",
    statement=(
        "With 40 % of the labels flipped rDPO is more accurate on clean held-out pairs than DPO, cDPO and IPO of "
        "the same strength (beta = tau = .5) on average, and than DPO beyond the 95 % interval of the difference "
        "(paired by seed)."
    ),
    cells=cells,
    experiment=experiment,
    judge=judge,
    sources=(Path(__file__), *world.SOURCES),
)
