"""INPO against DPO with the previous iterate as reference, on a small language model and an intransitive preference.

The preference looks at how an answer opens: courteous beats plain, plain beats rude, rude beats courteous, and each of
them beats any other opening, always at .8. Each round samples answers from the policy, labels them in twos and trains.
"""

import random
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from claims import game, inpo_classes, start, world
from claims.cells import Cell, Result, Store
from claims.game import exploitability
from claims.inpo_classes import CYCLE, label
from claims.report import Claim, Figure, Outcome, draw_bands, interval, values
from llmalign import INPOConfig, INPOTrainer, PairConfig, PairTrainer
from llmalign.embedded.grammar import read_sentence, split, split_sentences

OPENINGS = ("courteous", "plain", "rude", "other")
LABELS = {"inpo": "INPO, eta .3, tau .1", "dpo": "DPO, previous iterate, beta .3"}
SHAPE = {"samples": 768, "tokens": 32, "rounds": 8, "passes": 2, "batch": 16, "lr": 3e-4}
SMOKE = {"samples": 32, "tokens": 8, "rounds": 1, "passes": 1, "batch": 8, "smoke": True}


def opening(text: str) -> int:
    """The class of an answer by its first sentence: an index into OPENINGS."""
    sentences = split_sentences(text)
    read = read_sentence(sentences[0]) if sentences else None
    return OPENINGS.index(read.kind) if read is not None and read.kind in OPENINGS else len(OPENINGS) - 1


def draw_round(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, setting: dict[str, Any], seed: int
) -> tuple[list[dict[str, Any]], Tensor]:
    """Pairs of sampled answers to a prompt, labelled by opening, as prepared rows; and the classes' shares (4,)."""
    prompts = random.Random(seed).choices(split()[0], k=setting["samples"] // 2)
    drawn = world.answers(model, tokenizer, [p for p in prompts for _ in range(2)], tokens=setting["tokens"], seed=seed)
    classes = torch.tensor([opening(tokenizer.decode(ids, skip_special_tokens=True)) for ids in drawn])
    first, second = classes.view(-1, 2).unbind(1)
    wins = label(first, second, CYCLE, torch.Generator().manual_seed(seed)).tolist()
    rows = []
    for number, prompt in enumerate(prompts):
        pair = drawn[2 * number : 2 * number + 2]
        if pair[0] != pair[1]:
            chosen, rejected = pair if wins[number] else pair[::-1]
            ids = tokenizer(prompt.text, add_special_tokens=False)["input_ids"]
            rows.append({"row_id": number, "prompt_ids": ids, "chosen_ids": chosen, "rejected_ids": rejected})
    shares = classes.bincount(minlength=len(OPENINGS)).double() / len(classes)
    return rows, shares


def train_round(
    method: str, model: PreTrainedModel, rows: list[dict[str, Any]], setting: dict[str, Any], seed: int
) -> None:
    """One round of INPO (rows hold the log-probs of reference and previous iterate) or of DPO against its start."""
    steps = setting["passes"] * len(rows) // setting["batch"]
    with TemporaryDirectory() as scratch:
        shared = start.arguments(scratch, steps=steps, batch=setting["batch"], lr=setting["lr"], seed=seed)
        shared["alarm_prompts"] = 0
        trainer_class, config = (
            (INPOTrainer, INPOConfig(**shared, eta=setting["eta"], tau=setting["tau"]))
            if method == "inpo"
            else (PairTrainer, PairConfig(**shared, loss="dpo", beta=setting["beta"]))
        )
        trainer = trainer_class(
            model=model, args=config, train_dataset=Dataset.from_list(rows), processing_class=world.build_tokenizer()
        )
        start.train(trainer)


def cells(smoke: bool) -> list[Cell]:
    methods = {"inpo": {"eta": 0.3, "tau": 0.1}, "dpo": {"beta": 0.3}}
    seeds = [0] if smoke else [1, 2, 3]
    extra = SMOKE if smoke else {}
    return [Cell("inpo_model", m, seed, {**SHAPE, **o, **extra}) for seed in seeds for m, o in methods.items()]


def experiment(cell: Cell, store: Store) -> Result:
    s = cell.setting
    folder = start.start(store, start.SMOKE if s.get("smoke") else start.START)
    (model, tokenizer), (reference, _) = world.load(folder), world.load(folder)
    shares, gaps, divergence = [], [], []
    for number in range(s["rounds"] + 1):
        seed = 1000 * cell.seed + number
        rows, share = draw_round(model, tokenizer, s, seed)
        shares.append(share.tolist())
        gaps.append(exploitability(share.log(), CYCLE))
        rows = world.with_logps(reference, rows, "start")
        rows = world.with_logps(model, rows, "last")
        sides = ("chosen", "rejected")
        divergence.append(
            sum(row[f"last_{side}_logps"] - row[f"start_{side}_logps"] for row in rows for side in sides)
            / (2 * len(rows))
        )
        if number == s["rounds"]:
            break
        against = "start" if cell.method == "inpo" else "last"
        for row in rows:
            row.update({f"ref_{side}_logps": row[f"{against}_{side}_logps"] for side in sides})
        train_round(cell.method, model, rows, s, seed)
    return {
        "gap": gaps,
        "shares": shares,
        "kl": divergence,
        "rise": max(gaps) - gaps[0],
        "highest": max(gaps),
        "last": gaps[-1],
        "largest": max(max(share) for share in shares),
        "final_kl": divergence[-1],
    }


def judge(records: list[Result]) -> Outcome:
    keys = ("highest", "last", "largest", "final_kl")
    numbers = {k: {m: values(records, k, method=m) for m in LABELS} for k in keys}
    curves = {k: {m: values(records, k, method=m) for m in LABELS} for k in ("gap", "shares")}
    before = interval([run[0] for runs in curves["gap"].values() for run in runs]).mean
    inpo, dpo = numbers["highest"]["inpo"], numbers["highest"]["dpo"]
    rise = max(values(records, "rise", method="inpo"))

    def draw(figure: Figure) -> None:
        left, right = figure.subplots(1, 2)
        for number, method in enumerate(LABELS):
            color = f"C{number}"
            rounds = range(len(curves["gap"][method][0]))
            draw_bands(left, rounds, curves["gap"][method], LABELS[method], color)
            draw_bands(
                right, rounds, [[max(s) for s in run] for run in curves["shares"][method]], LABELS[method], color
            )
        left.set(xlabel="round", ylabel="duality gap", ylim=(0, 0.7), title="Distance from equilibrium: mean, 95 %")
        right.set(xlabel="round", ylabel="share of answers", ylim=(0, 1.05), title="Most frequent opening")
        left.legend(fontsize=8)

    return Outcome(
        holds=rise <= 0.05 and max(numbers["largest"]["inpo"]) < 0.6 and min(dpo) > max(inpo),
        verdict=(
            f"The duality gap starts at {before:.2f}. INPO's highest over {len(inpo)} seeds and all rounds is "
            f"{max(inpo):.2f} and its last {interval(numbers['last']['inpo']).text(2)}; DPO's highest is at least "
            f"{min(dpo):.2f} on every seed and its last {interval(numbers['last']['dpo']).text(2)}. The most "
            f"frequent opening reaches at most {max(numbers['largest']['inpo']):.2f} under INPO and "
            f"{max(numbers['largest']['dpo']):.2f} under DPO."
        ),
        columns=["method", "highest gap", "last gap", "largest share ever", "KL to the start, last round"],
        rows=[[LABELS[m], *(interval(numbers[k][m]).text() for k in keys)] for m in LABELS],
        numbers=numbers | curves,
        draw=draw,
    )


CLAIM = Claim(
    name="inpo_model",
    statement=(
        "A small language model trained by INPO on an intransitive preference does not move away from the "
        "equilibrium (its duality gap never rises more than .05 above its start, no opening passes .6), while DPO "
        "with the previous iterate as reference does (its highest gap is above INPO's on every seed)."
    ),
    cells=cells,
    experiment=experiment,
    judge=judge,
    sources=(
        Path(__file__),
        *(Path(module.__file__) for module in (game, inpo_classes)),
        *world.SOURCES,
    ),
)
