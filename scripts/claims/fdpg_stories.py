"""f-DPG on a story model of 260,000 parameters: a word that every story must contain, and shares of girls and of parks.

The model is an argument of the environment, LLMALIGN_STORIES_MODEL, and is checked by its bytes; the smoke run makes do
with the embedded world's. All divergences start from it, with the same settings, in this project's own trainer.

Distances are estimated without importance weights of the policy: 12,288 completions of the base, drawn once and kept,
are weighted to be the target's (a constraint keeps some and drops the rest), and 1,024 are drawn from the policy.
"""

import copy
import hashlib
import math
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.nn.functional as F
from datasets import Dataset
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from claims import start
from claims.cells import Cell, Result, Store, code_version, package_files
from claims.report import Claim, Figure, Outcome, draw_bands, interval, values
from llmalign.errors import UserError
from llmalign.evaluation.diversity import distinct_n, self_bleu
from llmalign.rewards.targets import DistributionalTarget, PointwiseTarget, Target
from llmalign.scores.sampling import sample_completions
from llmalign.scores.text import sequence_logps
from llmalign.trainers.fdpg import FDPGTrainer
from llmalign.trainers.fdpg_config import FDPGConfig

MODEL_VARIABLE = "LLMALIGN_STORIES_MODEL"
MODEL_SHA256 = "407a7c581bdd66972383ce9ad24857713fb98786d06ea564a2fe9b34ebe77dfd"
LABELS = {
    "base": "the base",
    "forward_kl": "KL(p, pi)",
    "js": "Jensen-Shannon",
    "tv": "total variation",
    "chi2_forward": "chi2(p, pi)",
    "reverse_kl": "KL(pi, p)",
    "chi2_reverse": "chi2(pi, p)",
}
MEASURED = {
    "kl_p_pi": 2,
    "kl_pi_p": 2,
    "js": 3,
    "tv": 3,
    "kl_pi_base": 2,
    "entropy": 1,
    "distinct_2": 3,
    "self_bleu": 3,
}
HEADINGS = {
    "kl_p_pi": "KL(p, pi)",
    "kl_pi_p": "KL(pi, p)",
    "js": "JS",
    "tv": "TV",
    "kl_pi_base": "KL(pi, base)",
    "entropy": "entropy",
    "distinct_2": "distinct-2",
    "self_bleu": "self-BLEU",
}
LEARNT = frozenset(
    ("_trl", "configs", "fdpg", "fdpg_config", "partition", "proposals", "rollouts", "sampled_configs", "text_scores")
)
FLOORED = frozenset({"reverse_kl", "chi2_reverse"})  # infinite under a constraint: b of a failure is 1e-6 for them
WORD = {"target": "pointwise", "prompt": "Once upon a time", "patterns": [r"\bdogs?\b"]}
SHARES = {
    "target": "distributional",
    "prompt": "Once upon a time, there was a big",
    "patterns": [r"\bgirls?\b", r"\bpark\b"],
    "moments": [0.5, 0.3],
}
SHAPE = {
    "batch": 256,
    "steps": 45,
    "tokens": 40,
    "lr": 1.5e-4,
    "warmup": 5,
    "pool": 12288,
    "drawn": 1024,
    "scored": 4096,
}
SMOKE = {"batch": 8, "steps": 2, "tokens": 6, "warmup": 1, "pool": 64, "drawn": 16, "smoke": True}


Table = dict[str, dict[str, list[float]]]


@dataclass(frozen=True)
class Stories:
    """The base, what is asked of it, and its kept completions: token ids, texts, log-probs (N,)."""

    setting: dict[str, Any]
    base: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    ids: list[list[int]]
    texts: list[str]
    logps: Tensor
    target: Target

    def features(self, texts: Sequence[str]) -> Tensor:
        """1 where a text contains a pattern, (N, K) float64."""
        return torch.stack([torch.tensor(contains(p)(texts)) for p in self.setting["patterns"]], 1).double()


def contains(pattern: str) -> Callable[..., list[float]]:
    """A feature as a reward function: 1 where the completion contains the pattern."""

    def feature(completions: Sequence[str], **columns: Any) -> list[float]:
        return [float(re.search(pattern, text) is not None) for text in completions]

    feature.__name__ = pattern
    return feature


def cells(smoke: bool) -> list[Cell]:
    if smoke:
        patterns = {"prompt": "Write", "patterns": ["e"]}
        return [Cell("fdpg_stories", "js", 0, {**SHAPE, **WORD, **patterns, **SMOKE})]
    return [
        Cell("fdpg_stories", method, seed, {**SHAPE, **target})
        for seed in (1, 2, 3)
        for target in (WORD, SHARES)
        for method in LABELS
        if method != "base" or seed == 1
    ]


def load(store: Store, smoke: bool) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A fresh copy of the base. UserError where it is another model than the claim was made on."""
    folder = start.start(store, start.SMOKE) if smoke else Path(os.environ[MODEL_VARIABLE])
    if not smoke:
        found = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
        if found != MODEL_SHA256:
            raise UserError(f"{MODEL_VARIABLE}: {folder} holds other weights ({found}) than the claim's model")
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), AutoTokenizer.from_pretrained(folder)


def sample(model: Any, tokenizer: Any, s: dict[str, Any], count: int, seed: int) -> tuple[list[list[int]], list[str]]:
    """Token ids of `count` completions of the prompt, and their texts."""
    prompts = [tokenizer(s["prompt"])["input_ids"]] * count
    ids = sample_completions(model, tokenizer, prompts, max_new_tokens=s["tokens"], seed=seed, batch_size=1024)
    return ids, tokenizer.batch_decode(ids, skip_special_tokens=True)


def logps(model: Any, tokenizer: Any, s: dict[str, Any], ids: Sequence[list[int]]) -> Tensor:
    """Log-probs (N,) float64 of completions of the prompt."""
    prompt = tokenizer(s["prompt"])["input_ids"]
    pairs = [(prompt, own) for own in ids]
    return sequence_logps(model, pairs, pad_token_id=tokenizer.pad_token_id, batch_size=512).double()


def stories(store: Store, s: dict[str, Any]) -> Stories:
    """The base with its kept completions and the target, whose lambda is solved on those."""
    base, tokenizer = load(store, bool(s.get("smoke")))
    keys = ("prompt", "tokens", "pool", "smoke")
    cell = Cell("fdpg_stories", "pool", 12345, {key: s[key] for key in keys if key in s})

    def build(folder: Path) -> None:
        ids, texts = sample(base, tokenizer, s, s["pool"], cell.seed)
        torch.save({"ids": ids, "texts": texts, "logps": logps(base, tokenizer, s, ids)}, folder / "pool.pt")

    code = code_version(path for path in package_files("llmalign.scores") if path.stem in ("sampling", "text"))
    kept = torch.load(store.model(cell, code, build) / "pool.pt", weights_only=True)
    target = DistributionalTarget(s["moments"]) if s["target"] == "distributional" else PointwiseTarget()
    made = Stories(s, base, tokenizer, kept["ids"], kept["texts"], kept["logps"], target)
    if isinstance(target, DistributionalTarget):
        target.fit(made.features(made.texts))
    return made


def measure(policy: Any, world: Stories, seed: int) -> Result:
    """Distances between the policy and the target in nats a completion, and what the policy's own ones are like."""
    s, tokenizer = world.setting, world.tokenizer
    tilt = world.target.log_target(world.logps, world.features(world.texts)) - world.logps
    log_z = float(torch.logsumexp(tilt, 0)) - math.log(len(tilt))
    possible = tilt.isfinite().nonzero().squeeze(1)[: s["scored"]]
    share = torch.softmax(tilt[possible], 0)  # of the target, among completions of the base
    p_there = world.logps[possible] + tilt[possible] - log_z
    pi_there = logps(policy, tokenizer, s, [world.ids[place] for place in possible.tolist()])
    ids, texts = sample(policy, tokenizer, s, s["drawn"], seed)
    own = world.features(texts)
    base, pi = logps(world.base, tokenizer, s, ids), logps(policy, tokenizer, s, ids)
    p = world.target.log_target(base, own) - log_z
    to_p = float((pi - p).mean())
    middle = (share * F.logsigmoid(p_there - pi_there)).sum() + F.logsigmoid(pi - p).mean() + 2 * math.log(2)
    apart = (share * (1 - (pi_there - p_there).clamp(max=0).exp())).sum() + (1 - (p - pi).clamp(max=0).exp()).mean()
    return {
        "kl_p_pi": float((share * (p_there - pi_there)).sum()),
        "kl_pi_p": to_p if math.isfinite(to_p) else None,
        "js": float(middle) / 2,
        "tv": float(apart) / 2,
        "kl_pi_base": float((pi - base).mean()),
        "entropy": -float(pi.mean()),
        "satisfied": own.mean(dim=0).tolist(),
        "distinct_2": distinct_n(ids[:500], 2),
        "self_bleu": self_bleu(ids[:200]),
    }


def train(cell: Cell, world: Stories, floor: float | None) -> tuple[Any, dict[str, list[float]]]:
    """A copy of the base after training, and what the trainer logged of every step."""
    s = cell.setting
    policy = copy.deepcopy(world.base)
    with TemporaryDirectory() as scratch:
        shared = start.arguments(
            scratch, steps=s["steps"], batch=s["batch"], lr=s["lr"], seed=cell.seed, warmup=s["warmup"],
            logging_strategy="steps", logging_steps=1,
        )  # fmt: skip
        args = FDPGConfig(
            **shared,
            divergence=cell.method,
            target=s["target"],
            moments=s.get("moments"),
            constraint_floor=floor,
            num_generations=s["batch"],
            max_completion_length=s["tokens"],
            scoring="padded",  # as fast as any where completions are this short
        )
        trainer = FDPGTrainer(
            policy,
            [contains(pattern) for pattern in s["patterns"]],
            args,
            train_dataset=Dataset.from_list([{"prompt": s["prompt"]}] * 64),
            processing_class=world.tokenizer,
        )
        start.train(trainer)
    keys = ("js", "kl_p_pi", "clamped", "log_z", *(("satisfied",) if s["target"] == "pointwise" else ()))
    steps = [entry for entry in trainer.state.log_history if "grad_norm" in entry]
    return policy, {key: [entry[key] for entry in steps] for key in keys}


def experiment(cell: Cell, store: Store) -> Result:
    s = cell.setting
    floor = 1e-6 if cell.method in FLOORED and s["target"] == "pointwise" else None
    world = stories(store, s)
    policy, curves = (world.base, {}) if cell.method == "base" else train(cell, world, floor)
    return {**measure(policy, world, cell.seed), "curves": curves}


def _report_table(records: list[Result], kind: str) -> Table:
    """By method, each measurement's values over the seeds; what is not finite on some seed is left out."""
    table: Table = {}
    for method in LABELS:
        found = {key: values(records, key, method=method, target=kind) for key in (*MEASURED, "satisfied")}
        if found["js"]:
            shares = [list(share) for share in zip(*found.pop("satisfied"), strict=True)]
            table[method] = {key: own for key, own in found.items() if None not in own}
            table[method] |= {f"satisfied_{place}": own for place, own in enumerate(shares)}
    return table


def _report_best(table: Table, key: str, pick: Callable[..., str]) -> str:
    """Which method has the lowest (min) or highest (max) mean of a measurement."""
    trained = [method for method in table if method != "base" and key in table[method]]
    return pick(trained, key=lambda method: interval(table[method][key]).mean)


def _report_conditions(word: Table, shares: Table) -> dict[str, bool]:
    """What the claim says, each part by itself; parts whose cells are not there are left out."""
    mild = [method for method in ("forward_kl", "js", "tv") if method in word]
    conditions = {
        f"{method} word": min(word[method]["satisfied_0"]) >= 0.6
        and max(word[method]["js"]) <= word["base"]["js"][0] / 2
        and max(word[method]["kl_p_pi"]) <= 1.3
        for method in mild
    }
    if len(mild) == 3 and "reverse_kl" in word:
        conditions["js satisfies more than forward_kl"] = (
            interval(word["js"]["satisfied_0"]).mean > interval(word["forward_kl"]["satisfied_0"]).mean
        )
        four = {method: word[method] for method in (*mild, "reverse_kl")}
        conditions["forward_kl has the lowest KL(p, pi)"] = _report_best(four, "kl_p_pi", min) == "forward_kl"
        conditions["reverse_kl satisfies most"] = _report_best(four, "satisfied_0", max) == "reverse_kl"
        conditions["reverse_kl has the lowest entropy"] = _report_best(four, "entropy", min) == "reverse_kl"
    for method in shares:
        if method != "base":
            conditions[f"{method} shares"] = max(shares[method]["js"]) <= shares["base"]["js"][0] / 2
    return conditions


def _report_rows(table: Table, title: str) -> list[list[str]]:
    rows = []
    for method, found in table.items():
        satisfied = [interval(own).text(2) for key, own in found.items() if key.startswith("satisfied")]
        cells = [interval(found[key]).text(digits) if key in found else "infinite" for key, digits in MEASURED.items()]
        rows.append([title, LABELS[method], ", ".join(satisfied), *cells])
    return rows


def judge(records: list[Result]) -> Outcome:
    word, shares = _report_table(records, "pointwise"), _report_table(records, "distributional")
    complete = "base" in word and len(word) > 1 and "base" in shares and len(shares) > 1
    conditions = _report_conditions(word, shares) if complete else {}
    failed = [name for name, met in conditions.items() if not met]
    sentences = []
    for title, table in (("the word", word), ("the shares", shares)):
        if len(table) > 1:
            best = {key: LABELS[_report_best(table, key, min)] for key in ("js", "kl_p_pi")}
            sentences.append(
                f"For {title} the lowest Jensen-Shannon divergence to the target is that of {best['js']}, the lowest "
                f"KL(p, pi) that of {best['kl_p_pi']}, the highest entropy that of "
                f"{LABELS[_report_best(table, 'entropy', max)]}"
            )
    sentences.append(f"Not met: {', '.join(failed)}" if failed else "All parts are met")

    def draw(figure: Figure) -> None:
        left, right = figure.subplots(1, 2)
        for number, method in enumerate(method for method in LABELS if method != "base"):
            for axes, kind, key in ((left, "pointwise", "satisfied"), (right, "distributional", "js")):
                runs = [curve[key] for curve in values(records, "curves", method=method, target=kind) if key in curve]
                if runs:
                    draw_bands(axes, range(len(runs[0])), runs, LABELS[method], f"C{number}")
        left.set(xlabel="step", title="Share of stories with the word")
        right.set(xlabel="step", ylim=(0, None), title="JS to the target of two shares")
        left.legend(fontsize=8)

    return Outcome(
        holds=complete and not failed,
        verdict=". ".join(sentences) + ".",
        columns=["target", "divergence", "satisfied", *(HEADINGS[key] for key in MEASURED)],
        rows=_report_rows(word, "a word") + _report_rows(shares, "two shares"),
        numbers={"word": word, "shares": shares, "conditions": conditions},
        draw=draw,
    )


CLAIM = Claim(
    name="fdpg_stories",
    statement=(
        "With one setting for all, KL(p, pi), Jensen-Shannon and TV bring a word that one story in thirteen has into "
        "at least 60 % of them, halve the Jensen-Shannon divergence to the target and end at a KL(p, pi) of at most "
        "1.3 nats. Jensen-Shannon satisfies more often than KL(p, pi), which stays nearest in KL(p, pi); KL(pi, p) "
        "with a floored constraint satisfies most and has the lowest entropy. With shares of two features as the "
        "target every divergence at least halves the Jensen-Shannon divergence to it."
    ),
    cells=cells,
    experiment=experiment,
    judge=judge,
    sources=(
        Path(__file__),
        Path(__file__).with_name("start.py"),
        *(path for path in package_files("llmalign.losses") if path.stem == "divergences"),
        *(path for path in package_files("llmalign.rewards") if path.stem == "targets"),
        *(path for path in package_files("llmalign.evaluation") if path.stem == "diversity"),
        *(path for path in package_files("llmalign.trainers") if path.stem in LEARNT),
        *package_files("llmalign.scores"),
    ),
    needs=MODEL_VARIABLE,
)
