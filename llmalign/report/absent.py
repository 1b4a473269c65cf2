"""What a report could show and does not, and the command that makes it."""

import shlex
from collections.abc import Sequence

from llmalign.report.collect import RELIABILITY, Run
from llmalign.report.markup import Html, el

SAMPLED = ("copg_online", "fdpg", "pf_ppo", "mdpo")
OF_IMAGES = ("diffusion_dpo", "seppo", "d3po", "pso", "pso_offline")


def absent(runs: Sequence[Run], *, has_kl: bool) -> Html | None:
    """A line for each thing that is missing, with the runs that lack it and one command that makes it."""
    trained = [run for run in runs if run.trained]
    of_text = [run for run in trained if run.method not in OF_IMAGES]
    lines = [
        _line("No training curves", [run for run in trained if not run.history],
              lambda run: f"llmalign train RECIPE --output_dir {_of(run)} --resume auto"),
        _line("Not finished: no metrics.json", [run for run in trained if not run.metrics and not run.rounds],
              lambda run: f"llmalign train RECIPE --output_dir {_of(run)} --resume auto"),
        _line("No win rate and no outputs", [run for run in of_text if not run.judged and not run.rows],
              lambda run: f"llmalign evaluate {_of(run)} --prompts prompts.jsonl --reward_model MODEL"),
        _line("A win rate without outputs to browse", [run for run in runs if run.judged and not run.rows],
              lambda run: f"llmalign evaluate {_of(run)} --prompts prompts.jsonl --reward_model MODEL"),
        _line("No images", [run for run in trained if run.method in OF_IMAGES and not run.pictures and not run.grid],
              lambda run: f"llmalign sample {_of(run)} --prompts prompts.txt --out {_of(run, 'samples')}"),
        _line("Not known how far the reward can be trusted",
              [run for run in trained if run.method == "pf_ppo" and not run.reliability],
              lambda run: f"llmalign reliability scored.jsonl --json {_of(run, RELIABILITY)}"),
    ]  # fmt: skip
    if not trained:
        lines.append(el("li", "No training curves and no recipe: name the folders of the runs, too, ",
                        el("code", "llmalign report RUN ...")))  # fmt: skip
    if trained and not has_kl:
        lines.append(el("li", f"No KL against reward: methods that sample log both ({', '.join(SAMPLED)}), ",
                        el("code", "llmalign train trainers/mdpo/recipe.yaml"), ", and so do rounds with a reward, ",
                        el("code", "llmalign iterate RECIPE --oracle reward")))  # fmt: skip
    found = [line for line in lines if line is not None]
    return el("ul", found, cls="absent") if found else None


def _line(what: str, runs: Sequence[Run], command: object) -> Html | None:
    if not runs:
        return None
    names = ", ".join(run.name for run in runs)
    return el("li", f"{what} ({names}): ", el("code", command(runs[0])))  # type: ignore[operator]


def _of(run: Run, *parts: str) -> str:
    return shlex.quote(str(run.path.joinpath(*parts)))
