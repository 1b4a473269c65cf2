"""A plan as tables for people."""

from collections.abc import Iterable

from rich.table import Table

from llmalign.plan.memory import GB
from llmalign.plan.run import Plan
from llmalign.plan.timing import readable


def tables(plan: Plan) -> Iterable[Table]:
    """The tables of a plan."""
    yield _run(plan)
    yield _memory(plan)
    if len(plan.table) > 1 or plan.target.memory is not None:
        yield _configs(plan)


def size(count: float) -> str:
    """Bytes in words, 1 GB being 1e9 bytes."""
    return f"{count / GB:.1f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"


def _run(plan: Plan) -> Table:
    table = Table(title=f"{plan.method} on {plan.model}", show_header=False)
    table.add_column(style="bold")
    table.add_column()
    share = f"{plan.trained:,} of them trained" if plan.trained < plan.parameters else "all of them trained"
    table.add_row("parameters", f"{plan.parameters:,}, {share}; {plan.precision}")
    counts = plan.counts
    if counts is not None:
        table.add_row(
            "data",
            f"{counts.rows:,} rows; longest sequence {counts.longest:,} tokens; read {plan.layout}, "
            f"{counts.padding:.0%} of it padding",
        )
        each = counts.fed / max(counts.rows, 1) * plan.total / plan.group
        if plan.steps * plan.total:
            table.add_row("tokens", f"about {each:,.0f} a step, {each * plan.steps:,.0f} in all")
    else:
        table.add_row("data", plan.layout)
    for name, report in plan.doctor.items():
        found = sum(finding["count"] for finding in report["findings"].values())
        table.add_row(
            f"doctor, {name}", f"{report['rows']:,} rows read, {found:,} findings (llmalign doctor says which)"
        )
    devices = plan.target.devices
    rows = "rows" if plan.group == 1 else "completions"
    table.add_row(
        "a step",
        f"{plan.total:,} {rows}: {plan.size} at a time, {plan.accumulation} times"
        + (f", on {devices} devices" if devices > 1 else "")
        + (", with activation checkpointing" if plan.checkpointing else ""),
    )
    table.add_row("steps", f"{plan.steps:,} ({plan.epochs:.3g} epochs)")
    table.add_row("time", "; ".join(_times(plan)))
    return table


def _times(plan: Plan) -> Iterable[str]:
    found = plan.calibration
    if found is not None and plan.seconds is not None:
        words = f"{readable(plan.seconds)} on this machine: {readable(found.step(plan.accumulation))} a step"
        if found.longest is not None:
            words += f"; a typical batch takes {readable(found.typical)}, the longest {readable(found.longest)}"
        yield words + "; evaluations and checkpoints are not in it"
    if plan.estimated is not None and plan.machine is not None:
        low, high = plan.estimated
        machine = plan.machine
        yield (
            f"{readable(low)} to {readable(high)} on {plan.target.devices} {machine.name}, worked out at "
            f"{machine.utilisation:.0%} of {machine.operations / 1e12:.0f} TFLOP/s; the first where sending hides "
            "behind computing"
        )
    if plan.calibration is None and plan.estimated is None:
        yield "not told: --calibrate runs a few steps here, --memory works it out for GPUs"


def _memory(plan: Plan) -> Table:
    table = Table(title=f"memory a device: {plan.shown}, {plan.moment}")
    table.add_column("part", min_width=40)
    table.add_column("bytes", justify="right")
    for part, count in plan.device.parts.items():
        table.add_row(part, size(count))
    table.add_row("together", size(plan.device.total), style="bold")
    return table


def _configs(plan: Plan) -> Table:
    memory = plan.target.memory
    limit = "" if memory is None else f", {size(memory)} each"
    table = Table(title=f"{plan.target.devices} device{'s' * (plan.target.devices > 1)}{limit}")
    for column in ("config", "weights", "gradients", "optimizer", "frozen models", "activations, logits", "rest"):
        table.add_column(column, justify="left" if column == "config" else "right")
    table.add_column("a device", justify="right")
    if memory is not None:
        table.add_column("fits")
    for name, (device, _) in plan.table.items():
        parts = device.parts
        frozen = sum(count for part, count in parts.items() if _is_frozen(part))
        passes = sum(parts.get(part, 0.0) for part in ("activations", "logits", "sampling cache", "sampled logits"))
        main = [parts.get(part, 0.0) for part in ("weights", "gradients", "optimizer")]
        rest = device.total - sum(main) - frozen - passes
        row = [name, *(size(count) for count in (*main, frozen, passes, rest)), size(device.total)]
        if memory is not None:
            row.append({True: "yes", False: "no", None: "unknown"}[plan.fits(device)])
        if device.host:
            row[0] += f" (+ {size(device.host)} of the host's)"
        table.add_row(*row)
    return table


def _is_frozen(part: str) -> bool:
    return part.startswith(("reference", "previous iterate", "reward model", "autoencoder", "text encoders"))


def sentences(plan: Plan) -> Iterable[str]:
    """What fits and how to run it, or what would; what was assumed; a line each."""
    if not plan.target.cuda:
        yield "Beside it Python and its libraries take some 0.6 GB."
    if plan.choice is not None and plan.command is not None:
        yield f"Fits with {plan.choice.config}: {size(plan.choice.device.total)} a device."
        if plan.total != plan.wanted:
            yield f"A step then has {plan.total} rows in place of {plan.wanted}."
        yield f"  {plan.command}"
    elif plan.ways_out:
        yield "Nothing fits. What would: " + "; ".join(plan.ways_out) + "."
    for note in dict.fromkeys(plan.notes):
        yield f"Note: {note}."
