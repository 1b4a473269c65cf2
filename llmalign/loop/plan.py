"""What a run of several rounds will take, from its recipe and a short trial of its model."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from rich.table import Table

from llmalign.loop.evaluate import MOST_CANDIDATES
from llmalign.loop.oracles import load_oracle, template
from llmalign.loop.rounds import make_run
from llmalign.loop.run import Run, let_go
from llmalign.loop.sample import Sampler
from llmalign.loop.score import FrozenScorer
from llmalign.loop.stages import MANIFEST, Row
from llmalign.recipe import Recipe
from llmalign.rewards.preference import RewardOracle
from llmalign.rewards.tournament import comparisons_of
from llmalign.types import PromptGroups

T = TypeVar("T")

BACKWARD = 3.0  # a training step takes about three times a forward pass


@dataclass(frozen=True)
class Part:
    """A kind of work: how much of it there is in all rounds, in which unit, and its seconds where they are known."""

    name: str
    amount: int
    unit: str
    seconds: float | None


@dataclass(frozen=True)
class Plan:
    """The parts of a run, and what was said of it."""

    title: str
    parts: list[Part]
    note: str


@dataclass(frozen=True)
class _Trial:
    """Seconds a unit, measured on a few prompts; an oracle over HTTP is not tried."""

    sampled_token: float
    scored_token: float
    judged: float | None
    prompt_tokens: float
    question_tokens: float  # of a judge's question, at four characters a token


def plan(recipe: Recipe) -> Plan:
    """Count a run's work and try a little of it; nothing is written but what reading data keeps in caches.

    Rounds that are done already are left out. Completions are counted as if all were `max_new_tokens` long, and no
    comparison as found, so these are upper bounds. Raises UserError as `iterate` does.
    """
    run = make_run(recipe)
    loop, trial = run.loop, _try(run)
    done = len(list(run.folder.glob(f"round-*/train/{MANIFEST}")))
    left = max(loop.rounds - done, 0)
    prompts = left * run.prompts_per_round
    completions = prompts * loop.samples_per_prompt
    measured = (left + (done == 0)) * loop.eval_prompts * loop.eval_samples
    judged, asked = _judged(run, done, prompts, measured)
    rows = prompts * _rows_of_a_prompt(run)
    row_tokens = int(trial.prompt_tokens) + loop.max_new_tokens * (loop.samples_per_prompt if run.groups else 2)
    scored = rows * row_tokens * (2 if run.needs_last else 1) + 2 * measured * loop.max_new_tokens
    trained = _trained_rows(run, left, rows) * row_tokens
    by_reward = loop.oracle == "reward"
    sampled, evaluated = completions * loop.max_new_tokens, measured * loop.max_new_tokens
    judging = None if trial.judged is None else asked * trial.judged
    parts = [
        Part("sample", sampled, "tokens", sampled * trial.sampled_token),
        Part("judge", asked, "rewards" if by_reward else "comparisons", judging),
        Part("cache", scored, "tokens", scored * trial.scored_token),
        Part("train", trained, "tokens", trained * trial.scored_token * BACKWARD),
        Part("evaluate", evaluated, "tokens", evaluated * trial.sampled_token),
    ]
    if loop.oracle == "judge":
        parts.insert(2, Part("questions", int(asked * trial.question_tokens), "tokens, about", None))
    return Plan(
        title=(
            f"{left} {'more ' if done else ''}rounds of {run.prompts_per_round:,} prompts x "
            f"{loop.samples_per_prompt} completions: {completions:,} generations, {judged:,} "
            f"{'rewards' if by_reward else 'comparisons'}, at most {rows:,} {'groups' if run.groups else 'pairs'}"
        ),
        parts=parts,
        note=(
            f"Upper bounds: every completion {loop.max_new_tokens} tokens long. Times from a trial of "
            f"{_trial_prompts(run)} prompts on one process, loading of models not counted. Judging includes that of "
            "evaluations." + (" A judge over HTTP is not tried." if trial.judged is None else "")
        ),
    )


def plan_table(planned: Plan) -> Table:
    """A plan as a table."""
    table = Table(title=planned.title, caption=planned.note)
    for name in ("stage", "work", "estimated time"):
        table.add_column(name, justify="left" if name == "stage" else "right")
    for part in planned.parts:
        table.add_row(part.name, f"{part.amount:,} {part.unit}", _duration(part.seconds))
    known = [part.seconds for part in planned.parts if part.seconds is not None]
    table.add_row("all", "", _duration(sum(known)) + ("" if len(known) == len(planned.parts) else " and the judge"))
    return table


def _judged(run: Run, done: int, prompts: int, measured: int) -> tuple[int, int]:
    """Comparisons or rewards of the pairs, and all that are asked for: those of evaluations, both orders."""
    loop = run.loop
    if loop.oracle == "reward":
        judged = prompts * loop.samples_per_prompt
        return judged, judged + measured
    judged = prompts * comparisons_of(loop.select, loop.samples_per_prompt)
    extra = 2 * (loop.rounds - done) * loop.eval_prompts * loop.eval_samples
    if loop.oracle == "preference_function" and loop.eval_samples > 1:  # of the duality gap
        pools = (min(MOST_CANDIDATES, (number + 1) * loop.eval_samples) for number in range(done, loop.rounds + 1))
        extra += sum(pools) * loop.eval_prompts * loop.eval_samples
    return judged, (judged + extra) * (2 if loop.both_orders else 1)


def _trained_rows(run: Run, rounds: int, rows: int) -> int:
    """Rows that training sees."""
    config = run.config
    if config.max_steps > 0:
        step = config.per_device_train_batch_size * config.gradient_accumulation_steps * run.world
        return rounds * config.max_steps * step
    return int(rows * config.num_train_epochs)


def _rows_of_a_prompt(run: Run) -> int:
    count = run.loop.samples_per_prompt
    many = {} if run.groups else {"all_pairs": count * (count - 1) // 2, "independent": count // 2}
    return many.get(run.loop.select, 1)


def _trial_prompts(run: Run) -> int:
    """As many as are sampled for at a time."""
    return min(max(1, run.loop.sampling_batch_size // run.loop.samples_per_prompt), len(run.prompts))


def _try(run: Run) -> _Trial:
    prompts: list[Row] = [{"place": place, **row} for place, row in enumerate(run.prompts[: _trial_prompts(run)])]
    sampler = Sampler(run, run.start, run.loop.samples_per_prompt)
    sampler.rows(prompts[:1], run.config.seed)  # what only the first call takes is not counted
    seconds, rows = _timed(lambda: sampler.rows(prompts, run.config.seed))
    sampler.close()
    groups = PromptGroups([row["prompt_ids"] for row in rows], [row["completion_ids"] for row in rows])
    scorer = FrozenScorer(run, run.start, groups)
    scoring, _ = _timed(lambda: scorer.rows(groups))
    scorer.close()
    let_go()
    drawn = sum(groups.lengths())
    return _Trial(
        sampled_token=seconds / max(drawn, 1),
        scored_token=scoring / sum(groups.unique_tokens()),
        judged=_try_oracle(run, rows),
        prompt_tokens=sum(map(len, groups.prompts)) / len(groups),
        question_tokens=_question_tokens(run, rows) if run.loop.oracle == "judge" else 0.0,
    )


def _question_tokens(run: Run, rows: list[Row]) -> float:
    texts = [len(str(row["prompt"])) + 2 * len(row["completions"][0]) for row in rows]
    return (len(template(run)) + sum(texts) / len(texts)) / 4


def _try_oracle(run: Run, rows: list[Row]) -> float | None:
    """Seconds of one comparison or reward."""
    if run.loop.oracle == "judge":
        return None
    oracle = load_oracle(run)
    prompts = [row["prompt"] for row in rows]
    first, second = ([row["completions"][place] for row in rows] for place in (0, 1))
    columns = {name: [row[name] for row in rows] for name in run.loop.oracle_columns or ()}
    if isinstance(oracle, RewardOracle):
        ids = [row["completion_ids"][0] for row in rows]
        return _timed(lambda: oracle.rewards(prompts, first, completion_ids=ids, **columns))[0] / len(rows)
    return _timed(lambda: oracle.preferences(prompts, first, second, **columns))[0] / len(rows)


def _timed(work: Callable[[], T]) -> tuple[float, T]:
    started = time.perf_counter()
    result = work()
    return time.perf_counter() - started, result


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return "unknown"
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
