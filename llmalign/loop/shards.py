"""Work that is done in parts, so that a run which is stopped goes on behind the last of them, whoever does which."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm  # type: ignore[import-untyped]

from llmalign.loop.run import Run, let_go
from llmalign.loop.stages import Made, Row, read_rows, wait_for, write_rows

SHARDS = "shards"


def write_shards(
    run: Run,
    folder: Path,
    rows: list[Row],
    *,
    size: int,
    start: Callable[[], Any],
    work: Callable[[Any, list[Row], int], Iterable[Row]],
    into: str,
    what: str,
    alone: bool = False,
    together: bool = False,
) -> Made:
    """Work on rows `size` at a time, each process on its share, and put the results end to end in the file `into`.

    With `alone` the main process does all of it. `start` makes what the work needs, such as a model, where there is
    work left; it is closed after it. With `together` no process makes it without the others. A shard is written whole,
    and a run that is stopped goes on behind its last one.
    """
    shards = [rows[first : first + size] for first in range(0, len(rows), size)]
    paths = [folder / SHARDS / f"{number:05d}.jsonl" for number in range(len(shards))]
    run.barrier()
    missing = [number for number, path in enumerate(paths) if not path.is_file()]
    run.barrier()  # before any process adds to them: all have seen the same
    share = (missing if run.main else []) if alone else missing[run.rank :: run.world]
    if share or (together and missing):
        tool = start()
        with tqdm(total=sum(len(shards[number]) for number in share), desc=what, unit="prompt",
                  disable=not run.main or run.config.disable_tqdm) as bar:  # fmt: skip
            for number in share:
                write_rows(paths[number], work(tool, shards[number], number))
                bar.update(len(shards[number]))
        tool.close()
        del tool
        let_go()
    if not run.main:
        return Made([])
    for path in paths:
        wait_for(path)
    write_rows(folder / into, (row for path in paths for row in read_rows(path)))
    return Made([into])
