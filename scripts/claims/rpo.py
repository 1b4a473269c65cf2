"""RPO against DPO where the labels come from a biased judge: the chosen log-prob and the true score over training.

The judge (llmalign.embedded.truth.proxy_score) likes courteous and long answers and agrees with the truth on about
70 % of pairs: pleasing it for long makes answers worse.
"""

import random
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from datasets import Dataset

from claims import start, world
from claims.cells import Cell, Result, Store
from claims.report import Claim, Figure, Outcome, draw_bands, interval, values
from llmalign import PairConfig, PairTrainer, RPOConfig, RPOTrainer
from llmalign.embedded.grammar import split
from llmalign.embedded.rows import pair_rows
from llmalign.embedded.truth import proxy_score, score

LABELS = {"rpo": "RPO", "dpo": "DPO"}
SHAPE = {"pairs": 800, "steps": 160, "every": 40, "batch": 16, "lr": 5e-4, "beta": 0.1, "eta": 0.5, "judged": 144}
SMOKE = {"pairs": 16, "steps": 2, "every": 1, "batch": 4, "judged": 4, "smoke": True}


def cells(smoke: bool) -> list[Cell]:
    seeds = [0] if smoke else [1, 2, 3]
    extra = SMOKE if smoke else {}
    return [Cell("rpo", method, seed, {**SHAPE, **extra}) for seed in seeds for method in LABELS]


def experiment(cell: Cell, store: Store) -> Result:
    s = cell.setting
    model, tokenizer = world.load(start.start(store, start.SMOKE if s.get("smoke") else start.START))
    held_out = split()[1]
    prompts = random.Random(cell.seed).sample(held_out, min(s["judged"], len(held_out)))
    rows = world.prepared(pair_rows(s["pairs"], cell.seed, scorer=proxy_score), tokenizer)
    rows = world.with_logps(model, rows, "ref")
    unseen = world.prepared(pair_rows(s["judged"], cell.seed, scorer=proxy_score, subset=held_out), tokenizer)
    before = world.pair_logps(model, unseen)[0].mean()
    curve: dict[str, list[float]] = {"step": [], "true": [], "proxy": [], "chosen": [], "drift": [], "words": []}

    def look(policy: Any, step: int) -> None:
        drawn = world.answers(policy, tokenizer, prompts, tokens=96, seed=cell.seed)
        texts = [tokenizer.decode(ids, skip_special_tokens=True) for ids in drawn]
        chosen = world.pair_logps(policy, unseen)[0].mean()
        pairs = list(zip(prompts, texts, strict=True))
        measured = {
            "step": step,
            "true": sum(score(p.text, t) for p, t in pairs) / len(pairs),
            "proxy": sum(proxy_score(p.text, t) for p, t in pairs) / len(pairs),
            "chosen": float(chosen),
            "drift": float(chosen - before),
            "words": sum(len(t.split()) for t in texts) / len(texts),
        }
        for key, value in measured.items():
            curve[key].append(value)

    look(model, 0)
    with TemporaryDirectory() as scratch:
        shared = start.arguments(scratch, steps=s["steps"], batch=s["batch"], lr=s["lr"], seed=cell.seed)
        shared |= {"alarm_prompts": 0, "beta": s["beta"]}
        trainer_class, config = (
            (RPOTrainer, RPOConfig(**shared, eta=s["eta"]))
            if cell.method == "rpo"
            else (PairTrainer, PairConfig(**shared, loss="dpo"))
        )
        trainer = trainer_class(
            model=model,
            args=config,
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
            callbacks=[world.Watch(s["every"], look)],
        )
        start.train(trainer)
    return {**curve, "last_true": curve["true"][-1], "best_true": max(curve["true"]), "last_drift": curve["drift"][-1]}


def judge(records: list[Result]) -> Outcome:
    keys = ("true", "proxy", "drift", "words")
    curves = {k: {m: values(records, k, method=m) for m in LABELS} for k in keys}
    steps = records[0]["result"]["step"]
    last = {k: {m: interval([run[-1] for run in curves[k][m]]) for m in LABELS} for k in keys}
    lost = {m: interval([max(run) - run[-1] for run in curves["true"][m]]) for m in LABELS}
    gain = interval([r[-1] - d[-1] for r, d in zip(curves["true"]["rpo"], curves["true"]["dpo"], strict=True)])
    apart = [r[-1] - d[-1] for r, d in zip(curves["drift"]["rpo"], curves["drift"]["dpo"], strict=True)]
    first = interval([run[0] for runs in curves["true"].values() for run in runs]).mean

    def draw(figure: Figure) -> None:
        titles = {"true": "True score of samples", "drift": "Chosen log-prob, change in nats"}
        for axes, (key, title) in zip(figure.subplots(1, 2), titles.items(), strict=True):
            for number, method in enumerate(LABELS):
                draw_bands(axes, steps, curves[key][method], LABELS[method], f"C{number}")
            axes.set(xlabel="step", title=f"{title}: mean, 95 %")
            axes.legend(fontsize=8)

    return Outcome(
        holds=gain.low > 0 and min(apart) > 0,
        verdict=(
            f"The true score of sampled answers starts at {first:.2f} and ends at {last['true']['rpo'].text(2)} "
            f"with RPO and {last['true']['dpo'].text(2)} with DPO (difference {gain.text(2)}, paired by seed); "
            f"from its best point DPO loses {lost['dpo'].text(2)} and RPO {lost['rpo'].text(2)}. The held-out "
            f"chosen log-prob changes by {last['drift']['rpo'].text(1)} nats with RPO and "
            f"{last['drift']['dpo'].text(1)} with DPO."
        ),
        columns=["method", "true score", "lost from the best", "biased judge's score", "chosen log-prob", "words"],
        rows=[
            [LABELS[m], last["true"][m].text(2), lost[m].text(2), last["proxy"][m].text(2)]
            + [last["drift"][m].text(1), last["words"][m].text(1)]
            for m in LABELS
        ],
        numbers={"steps": steps, **curves},
        draw=draw,
    )


CLAIM = Claim(
    name="rpo",
    statement=(
        "With labels from a biased judge RPO keeps the chosen log-prob up where DPO lets it fall, and its answers "
        "end with the higher true score (paired by seed, the 95 % interval of the difference above 0)."
    ),
    cells=cells,
    experiment=experiment,
    judge=judge,
    sources=(Path(__file__), *world.SOURCES),
)
