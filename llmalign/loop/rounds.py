"""`llmalign iterate`: rounds of sampling, judging, pairing, scoring, training and measuring, each stage done once."""

import fcntl
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from llmalign.errors import UserError
from llmalign.loop.cache import ROWS, add_logps, remove_parts
from llmalign.loop.comparisons import Comparisons
from llmalign.loop.config import HARMLESS, LoopConfig
from llmalign.loop.evaluate import REWARDS, measure, sample_held_out
from llmalign.loop.judge import JUDGED, judge, score
from llmalign.loop.oracles import check_oracle, load_oracle, oracle_identity, try_oracle
from llmalign.loop.pair import PAIRS, pair
from llmalign.loop.report import plot_rounds
from llmalign.loop.run import Run, identity, let_go
from llmalign.loop.sample import SAMPLES, sample
from llmalign.loop.stages import (
    MANIFEST,
    Made,
    Manifest,
    Row,
    digest_of,
    read_manifest,
    read_rows,
    write_json,
    write_manifest,
)
from llmalign.loop.train import remove_checkpoints, train
from llmalign.recipe import Recipe
from llmalign.rewards.preference import Oracle, RewardOracle
from llmalign.trainers.run_folder import HARMLESS_KEYS, as_plain, compare_recipes, guard_output_dir

LOOP_FILE = "loop.json"
ROUNDS_FILE = "rounds.json"
COMPARISONS_FILE = "comparisons.sqlite"
LOCK_FILE = ".lock"
PICTURE_FILE = "rounds.png"


def iterate(recipe: Recipe) -> dict[str, Any]:
    """Go through all rounds of a recipe and return what was measured, which `<output_dir>/rounds.json` holds too.

    A folder that holds a part of this run is gone on from, and ends with the bytes of a run that was never stopped.
    Raises UserError, with nothing written, for a recipe, a model, data or an oracle that rounds cannot be made of.
    """
    rounds = Rounds(make_run(recipe))
    with _alone(rounds.run):
        _remember(rounds)
        return rounds.go()


def make_run(recipe: Recipe) -> Run:
    """The checked run of a recipe: its keys fit, and it has a model, a tokenizer and prompts enough."""
    try:
        loop = LoopConfig(**recipe.loop)
    except UserError as error:
        raise UserError(recipe.blame(error)) from error
    run = Run(recipe, loop)
    check_oracle(run)
    _ = run.prompts_per_round
    return run


class Rounds:
    """The rounds of a run, stage after stage; what is done already is found."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self._oracle = oracle_identity(run)
        # What stands for the model of each round in a manifest.
        self._models: dict[int, str] = {0: identity(run.start)}
        self._reference = self._models[0] if run.reference == run.start else identity(run.reference)

    def fingerprint(self) -> dict[str, Any]:
        """Everything that decides the results: the resolved recipe, and what it names by its content."""
        return {
            **self.run.fingerprint(),
            "prompts_sha256": digest_of(self.run.prompts),
            "start_sha256": self._models[0],
            "reference_sha256": self._reference,
        }

    def go(self) -> dict[str, Any]:
        """All rounds, and what was measured."""
        run = self.run
        self._refuse_fewer_rounds()
        self._refuse_other_oracle()
        stages: list[dict[str, Manifest]] = [{"evaluate": self._evaluate(0, [])}] if run.loop.eval_prompts else [{}]
        for number in range(1, run.loop.rounds + 1):
            stages.append(self._round(number, stages))
            self._prune(number)
        result = {
            "method": run.recipe.method.name,
            "model": str(run.options.model_name_or_path),
            "oracle": run.loop.preference_function or run.loop.preference_model or run.loop.judge_model or "rewards",
            "rounds": [_summary(number, own) for number, own in enumerate(stages)],
            "final_model": run.model(run.loop.rounds),
        }
        if run.main:
            write_json(run.folder / ROUNDS_FILE, result)
            plot_rounds(result, run.folder / PICTURE_FILE)
        return result

    def _refuse_fewer_rounds(self) -> None:
        done = len(list(self.run.folder.glob(f"round-*/train/{MANIFEST}")))
        if done > self.run.loop.rounds:
            raise UserError(
                f"{self.run.folder} holds {done} finished rounds and the recipe asks for {self.run.loop.rounds}: ask "
                f"for {done} or more, or give a new output_dir"
            )

    def _refuse_other_oracle(self) -> None:
        """What another oracle has judged is not mixed with what this one says, and is not thrown away either."""
        for path in sorted(self.run.folder.glob(f"round-*/judge/{MANIFEST}")):
            if read_manifest(path.parent).inputs.get("oracle") != self._oracle:
                raise UserError(
                    f"{path.parent} was judged by another oracle (its code, weights or question have changed): put the "
                    "old one back, or give a new output_dir"
                )

    def _round(self, number: int, before: list[dict[str, Manifest]]) -> dict[str, Manifest]:
        run, last = self.run, self._models[number - 1]
        done: dict[str, Manifest] = {}
        prompts = run.round_prompts(number)
        done["sample"] = self._stage(
            number, "sample", {"model": last, "prompts": digest_of(prompts)},
            lambda folder: sample(run, folder, run.model(number - 1), prompts, run.loop.samples_per_prompt,
                                  run.seed(number, "sample")),
        )  # fmt: skip
        samples = {"samples": done["sample"].digest()}
        done["judge"] = self._stage(
            number, "judge", {**samples, "oracle": self._oracle}, lambda folder: self._judge(number, folder)
        )
        done["pair"] = self._stage(
            number, "pair", {**samples, "judged": done["judge"].digest()}, lambda folder: self._pair(number, folder),
            seed=run.seed(number, "judge"),  # a plan that draws must draw again what it drew when it asked
        )  # fmt: skip
        done["cache"] = self._stage(
            number, "cache",
            {"pairs": done["pair"].digest(), "reference": self._reference, "last": last},
            lambda folder: add_logps(run, folder, self._rows(number, "pair", PAIRS), run.frozen_models(number)),
        )  # fmt: skip
        done["train"] = self._stage(
            number, "train", {"rows": done["cache"].digest(), "model": last},
            lambda folder: train(run, number, folder, self._rows(number, "cache", ROWS)),
        )  # fmt: skip
        self._models[number] = done["train"].digest()
        if run.loop.eval_prompts:
            done["evaluate"] = self._evaluate(number, before)
        return done

    def _stage(
        self, number: int, name: str, inputs: dict[str, str], make: Callable[[Path], Made], seed: int | None = None
    ) -> Manifest:
        """A stage, and its leftovers removed."""

        def make_and_let_go(folder: Path) -> Made:
            made = make(folder)
            let_go()
            return made

        manifest = self.run.stage(number, name, inputs, make_and_let_go, seed)
        if self.run.main:
            folder = self.run.round_folder(number) / name
            if name != "train":
                remove_parts(folder)
            elif not self.run.loop.keep_checkpoints:
                remove_checkpoints(folder)
        return manifest

    def _judge(self, number: int, folder: Path) -> Made:
        run = self.run
        if not run.main:
            return Made([])
        samples = read_rows(run.round_folder(number) / "sample" / SAMPLES)
        with self._oracle_at_hand() as oracle:
            if isinstance(oracle, RewardOracle):
                return score(run, folder, samples, oracle)
            with self._kept(oracle) as comparisons:
                return judge(run, folder, samples, comparisons, run.seed(number, "judge"))

    def _pair(self, number: int, folder: Path) -> Made:
        if not self.run.main:
            return Made([])
        home = self.run.round_folder(number)
        samples, judged = read_rows(home / "sample" / SAMPLES), read_rows(home / "judge" / JUDGED)
        return pair(self.run, folder, samples, judged, self.run.seed(number, "judge"))

    def _evaluate(self, number: int, before: list[dict[str, Manifest]]) -> Manifest:
        run = self.run
        inputs = {"model": self._models[number], "oracle": self._oracle, "reference": self._reference}
        inputs |= {f"round-{earlier}": own["evaluate"].digest() for earlier, own in enumerate(before)}

        seed = run.seed(number, "evaluate")

        def make(folder: Path) -> Made:
            earlier = [self._held_out(one) for one in range(number)]
            made = sample_held_out(run, number, folder, seed)
            if run.main:
                with self._oracle_at_hand() as oracle:
                    made.measured = measure(run, folder, earlier, oracle, self._kept)
                made.outputs += [REWARDS] if run.loop.oracle == "reward" else []
            return made

        return self._stage(number, "evaluate", inputs, make)

    @contextmanager
    def _oracle_at_hand(self) -> Iterator[Oracle | RewardOracle]:
        """The oracle, loaded; it is let go again, so that training has the memory."""
        oracle = load_oracle(self.run)
        try:
            yield oracle
        finally:
            oracle.close()

    def _kept(self, oracle: Oracle) -> Comparisons:
        return Comparisons(self.run.folder / COMPARISONS_FILE, oracle, self._oracle)

    def _held_out(self, number: int) -> list[Row]:
        """A round's answers to the held-out prompts, with their rewards where the oracle gives such."""
        rows = self._rows(number, "evaluate", SAMPLES)
        if self.run.loop.oracle != "reward":
            return rows
        rewards = self._rows(number, "evaluate", REWARDS)
        return [{**row, **own} for row, own in zip(rows, rewards, strict=True)]

    def _rows(self, number: int, stage: str, name: str) -> list[Row]:
        return list(read_rows(self.run.round_folder(number) / stage / name))

    def _prune(self, number: int) -> None:
        """Drop the weights of rounds that no later one needs, as the recipe says; never the last ones."""
        keep = self.run.loop.keep_rounds
        if keep is None or not self.run.main:
            return
        for old in range(1, number - keep + 1):
            folder = self.run.round_folder(old) / "train"
            manifest = read_manifest(folder)
            doomed = [name for name in manifest.outputs if name.endswith(".safetensors")]
            if manifest.pruned != doomed:
                manifest.pruned = doomed
                write_manifest(folder, manifest)  # before the files go: a file that is missing must be known to be
            for name in manifest.pruned:
                (folder / name).unlink(missing_ok=True)


def _summary(number: int, stages: dict[str, Manifest]) -> dict[str, Any]:
    """What a round came to: counts of its stages, and what was measured at its end."""
    measured = stages["evaluate"].measured if "evaluate" in stages else {}
    counts = {name: manifest.counts for name, manifest in stages.items() if name not in ("evaluate", "cache")}
    trained = {f"{name}_{key}": value for name in ("sample", "judge", "pair", "train") if name in stages
               for key, value in stages[name].measured.items()}  # fmt: skip
    return {"round": number, **measured, "counts": counts, **trained}


@contextmanager
def _alone(run: Run) -> Iterator[None]:
    """Hold the run's folder. Raises UserError where another process works in it."""
    if not run.main:
        yield
        return
    try:
        run.folder.mkdir(parents=True, exist_ok=True)
        file = (run.folder / LOCK_FILE).open("w")
    except OSError as error:
        raise UserError(f"output_dir {run.folder} cannot be written ({error.strerror}); give another") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise UserError(f"another process works in {run.folder}; wait for it, or give a new output_dir") from error
        yield


def _remember(rounds: Rounds) -> None:
    """Write down what decides the results, or refuse to go on with something else than the folder was begun with."""
    run = rounds.run
    if not run.main:
        return
    path, fingerprint = run.folder / LOOP_FILE, rounds.fingerprint()
    if path.is_file():
        # Where rounds share all prompts, more of them would give each other ones.
        shared = {"rounds"} if run.loop.prompts_per_round is None else set()
        compare_recipes(path, fingerprint, frozenset((HARMLESS_KEYS | HARMLESS) - shared))
        return
    guard_output_dir(run.folder, None, fingerprint)
    try_oracle(run)
    write_json(path, dict(sorted(as_plain(fingerprint).items())))
