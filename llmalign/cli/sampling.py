"""`llmalign sample`."""

import argparse
import json
import os
import re
import shlex
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmalign.cli.common import console
from llmalign.errors import UserError

SAMPLE_HELP = """\
MODEL is an image pipeline (a folder, a Hub name or embedded:digits), or the folder of a run or of its LoRA checkpoint:
a whole pipeline, or LoRA weights, whose pipeline is --base or the one that they were trained on. Prompts are --prompt
TEXT (any number of them), or a file: .txt with one a line, or rows with a column caption, prompt or text, read as for
doctor (--split, --columns, --where, --max_rows). Writes DIR/NNNNN.png, DIR/images.jsonl (prompt, images, seeds; what
`llmalign pairs` reads) and DIR/grid.png. An adapter, or any model with --base, is shown beside its start: same prompts,
same seeds, whose images are in DIR/start. The seed, not the batch size, decides what an image starts from.

  llmalign sample runs/dpo --prompts prompts.txt --out samples --reward brightness
  llmalign sample ./pipeline --prompt "digit seven" --per_prompt 8 --out sevens --adaptive_guidance
"""
NAMED, START = re.compile(r"\d{5,}\.png"), "start"
ROWS_FILE, GRID_FILE = "images.jsonl", "grid.png"
SHOWN = 32  # columns of the grid
SCORED_AT_ONCE = 64


def add(commands: Any, layout: dict[str, Any]) -> None:
    """Add the parser to the command line's grammar; `layout` holds what all parsers share."""
    command = commands.add_parser("sample", help="draw images, before and after", description=SAMPLE_HELP, **layout)
    command.add_argument("model", metavar="MODEL")
    command.add_argument("--base", metavar="BEFORE", help="what an adapter is put on, or what MODEL is compared with")
    command.add_argument("--prompts", metavar="FILE", help="prompts from a file")
    command.add_argument("--prompt", metavar="TEXT", action="append", default=[], help="a prompt")
    command.add_argument("--out", required=True, metavar="DIR", help="where to write")
    command.add_argument("--overwrite", action="store_true", help="replace the images that an earlier call left in DIR")
    command.add_argument("--per_prompt", type=int, default=1, metavar="K", help="images of each prompt (1)")
    command.add_argument("--steps", type=int, metavar="N", help="of the sampler (the pipeline's default)")
    command.add_argument("--guidance", type=float, metavar="G", help="guidance scale (the pipeline's default)")
    command.add_argument("--size", type=int, metavar="PIXELS", help="of a side (the pipeline's default)")
    command.add_argument("--seed", type=int, default=0, help="of the first image; the others' follow from it (0)")
    command.add_argument("--batch_size", type=int, default=4, metavar="B", help="images at a time (4)")
    command.add_argument(
        "--adaptive_guidance", type=float, nargs="?", const=0.991, metavar="THRESHOLD",
        help="leave out unconditional passes once the cosine of both predictions reaches this (0.991)",
    )  # fmt: skip
    command.add_argument(
        "--max_cfg_fraction", type=float, metavar="SHARE",
        help="of --adaptive_guidance: leave them out after this share of the steps in any case",
    )  # fmt: skip
    command.add_argument("--reward", metavar="NAME", action="append", default=[], help="score the images; repeatable")
    command.set_defaults(run=_sample)


def _sample(options: argparse.Namespace, rest: list[str]) -> int:
    prompts = _prompts(options, rest)
    if options.per_prompt < 1:
        raise UserError(f"--per_prompt draws at least one image, not {options.per_prompt}.")
    if options.adaptive_guidance is not None and not 0 < options.adaptive_guidance <= 1:
        raise UserError(f"--adaptive_guidance is a cosine between 0 and 1, not {options.adaptive_guidance:g}.")
    if options.max_cfg_fraction is not None and options.adaptive_guidance is None:
        raise UserError("--max_cfg_fraction belongs to --adaptive_guidance: give both, or neither.")
    from llmalign.diffusion.sampling import starting_point

    start = starting_point(options.model, options.base)
    rewards = _rewards(options.reward)
    out = Path(options.out)
    _check_room(out, options.overwrite)
    each = [prompt for prompt in prompts for _ in range(options.per_prompt)]
    drawn = {} if start is None else {START: _draw(start, None, each, out / START, options)}
    drawn["aligned" if drawn else "images"] = _draw(options.model, options.base, each, out, options)
    if start is None:
        _clear(out / START)
    paths = {title: found.paths for title, found in drawn.items()}
    scores = {
        name: {title: _score(reward, each, files) for title, files in paths.items()} for name, reward in rewards.items()
    }
    _write_rows(out, each, drawn[list(drawn)[-1]], options)
    _draw_grid(out / GRID_FILE, each, paths, scores)
    _say(out, each, drawn, scores)
    return 0


@dataclass(frozen=True)
class Drawn:
    """Where the images of one model lie, and what adaptive guidance said of itself."""

    paths: list[Path]
    savings: str | None


def _prompts(options: argparse.Namespace, rest: list[str]) -> list[str]:
    lines = options.prompts is not None and options.prompts.endswith(".txt")
    if rest and (options.prompts is None or lines):
        raise UserError(
            f"sample does not know {' '.join(rest)}; what reads rows is for a --prompts file that has rows."
        )
    prompts = list(options.prompt)
    if lines:
        prompts += _text_lines(Path(options.prompts))
    elif options.prompts is not None:
        prompts += _rows(options.prompts, rest)
    if not prompts:
        raise UserError("There is no prompt: give --prompt TEXT, or --prompts FILE.")
    return prompts


def _text_lines(file: Path) -> list[str]:
    if not file.is_file():
        raise UserError(f"There is no file {file} with prompts.")
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file} cannot be read as UTF-8 text: {error}.") from error
    return [line.strip() for line in lines if line.strip()]


def _rows(data: str, rest: list[str]) -> list[str]:
    from llmalign.data.doctor import Limits
    from llmalign.data.images import load_image_rows
    from llmalign.recipe import doctor_options

    source, limits = doctor_options(data, rest)
    if limits != Limits():
        raise UserError("sample takes prompts as they are: the doctor's --max_... limits are not for it.")
    return load_image_rows(source, kind="captions")["caption"][:]


def _rewards(names: Sequence[str]) -> dict[str, Any]:
    """Loaded before anything is drawn, so that a misspelt one costs nothing."""
    if not names:
        return {}
    import torch

    from llmalign.rewards.images import load_image_reward

    device = "cuda" if torch.cuda.is_available() else "cpu"
    return {name: load_image_reward(name, device=device) for name in names}


def _check_room(out: Path, overwrite: bool) -> None:
    if out.is_file():
        raise UserError(f"--out {out} is a file; name a folder.")
    if out.is_dir() and any(out.iterdir()) and not overwrite:
        raise UserError(f"--out {out} is not empty; give --overwrite to replace its images, or another --out.")


def _clear(folder: Path) -> None:
    """Take away what an earlier call left, and nobody else's files."""
    images = sorted(path for path in folder.glob("*.png") if NAMED.fullmatch(path.name))
    # The rows first: where they are, the images are whole.
    for path in (folder / ROWS_FILE, folder / GRID_FILE, *images):
        path.unlink(missing_ok=True)


def _draw(model: str, base: str | None, prompts: list[str], folder: Path, options: argparse.Namespace) -> Drawn:
    from llmalign.diffusion.guidance import adaptive_guidance
    from llmalign.diffusion.sampling import load_for_sampling, sample_images

    pipe = load_for_sampling(model, base)
    _clear(folder)
    threshold = options.adaptive_guidance
    paths = [folder / f"{index:05d}.png" for index in range(len(prompts))]
    options_of = {"threshold": threshold, "max_cfg_fraction": options.max_cfg_fraction}
    with nullcontext() if threshold is None else adaptive_guidance(pipe, **options_of) as savings:
        images = sample_images(
            pipe,
            prompts,
            seed=options.seed,
            steps=options.steps,
            guidance=options.guidance,
            batch_size=options.batch_size,
            size=options.size,
        )
        for path, image in zip(paths, images, strict=True):
            _write(path, lambda handle, image=image: image.save(handle, format="PNG"))
    return Drawn(paths, None if savings is None else savings.text())


def _write(path: Path, write: Any) -> None:
    """Whole or not at all."""
    aside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(aside, "wb") as handle:
                write(handle)
            os.replace(aside, path)
        finally:
            aside.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror or error}.") from error


def _score(reward: Any, prompts: list[str], paths: list[Path]) -> list[float]:
    found: list[float] = []
    for first in range(0, len(paths), SCORED_AT_ONCE):
        part = slice(first, first + SCORED_AT_ONCE)
        found += reward(prompts[part], _open(paths[part])).tolist()
    return found


def _open(paths: list[Path]) -> list[Any]:
    from PIL import Image

    images = [Image.open(path) for path in paths]
    for image in images:
        image.load()  # which closes its file
    return images


def _write_rows(out: Path, prompts: list[str], drawn: Drawn, options: argparse.Namespace) -> None:
    from llmalign.diffusion.sampling import image_seeds

    seeds = image_seeds(options.seed, len(prompts))
    names = [path.name for path in drawn.paths]
    rows = []
    for first in range(0, len(prompts), options.per_prompt):
        part = slice(first, first + options.per_prompt)
        rows.append({"prompt": prompts[first], "images": names[part], "seeds": seeds[part]})
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    _write(out / ROWS_FILE, lambda handle: handle.write(text.encode()))


def _draw_grid(path: Path, prompts: list[str], paths: dict[str, list[Path]], scores: dict[str, dict[str, Any]]) -> None:
    from llmalign.diffusion.sampling import draw_grid

    captions = None
    if scores:
        first = next(iter(scores.values()))
        captions = [[f"{score:.3g}" for score in first[title][:SHOWN]] for title in paths]
    images = [_open(files[:SHOWN]) for files in paths.values()]
    draw_grid(images, prompts[:SHOWN], path, list(paths), captions)


def _say(out: Path, prompts: list[str], drawn: dict[str, Drawn], scores: dict[str, dict[str, list[float]]]) -> None:
    screen = console()
    shown = f" (the first {SHOWN} of {len(prompts)})" if len(prompts) > SHOWN else ""
    under = f"; under each image its {next(iter(scores))}" if scores else ""
    lines = [f"{len(prompts)} images in {shlex.quote(str(out))}, side by side in {out / GRID_FILE}{shown}{under}."]
    lines += [f"{title}: {found.savings}" for title, found in drawn.items() if found.savings is not None]
    screen.print("\n".join(lines), highlight=False, soft_wrap=True, markup=False)
    if scores:
        screen.print(_table(prompts, scores))


def _table(prompts: list[str], scores: dict[str, dict[str, list[float]]]) -> Any:
    """Means with 95 % intervals, whole prompts drawn; images without a reward on either side are left out of both."""
    import math

    from rich.table import Table

    from llmalign.evaluation.winrate import bootstrap_mean, paired_difference

    titles = list(next(iter(scores.values())))
    table = Table()
    table.add_column("mean reward [95 %]", overflow="fold")
    for title in [*titles, *["difference"] * (len(titles) - 1), "images"]:
        table.add_column(title, no_wrap=True)
    for name, found in scores.items():
        kept = [place for place in range(len(prompts)) if all(math.isfinite(found[title][place]) for title in titles)]
        if not kept:
            table.add_row(name, *["no reward"] * len(titles), *[""] * (len(titles) - 1), "0")
            continue
        # The images of a single prompt are what there is to draw from.
        clusters = [prompts[place] for place in kept] if len(set(prompts)) > 1 else None
        sides = [[found[title][place] for place in kept] for title in titles]
        cells = [bootstrap_mean(side, clusters).text(digits=4) for side in sides]
        if len(sides) > 1:
            cells.append(paired_difference(sides[1], sides[0], clusters).text(digits=4))
        table.add_row(name, *cells, str(len(kept)))
    return table
