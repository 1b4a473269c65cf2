"""A whole plan: what a recipe holds and takes, where it fits, and what to change; as one object that JSON can hold."""

import logging
import os
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

from llmalign.errors import UserError
from llmalign.plan.allowed import configs_for
from llmalign.plan.calibrate import SMALL, Steps, calibrated
from llmalign.plan.facts import PROMPTS, Target, text_facts
from llmalign.plan.rows import Counts, counted
from llmalign.plan.sharding import DDP, FSDP2, ZERO1, ZERO3, Device
from llmalign.plan.suggest import Choice, accumulation_for, choose, command, usable
from llmalign.plan.text import TextPlan
from llmalign.plan.timing import H100, Machine, communication, operations, step_seconds, work_of
from llmalign.recipe import Recipe
from llmalign.scores.scoring import SHARED_PROMPT
from llmalign.train import model_path, refuse_endless

logger = logging.getLogger(__name__)


@dataclass
class Plan:
    """What is told of a run. Sizes are bytes, times seconds.

    `total` are the rows of a step on all devices, `wanted` those that the recipe has on one; where completions are
    sampled they are meant, `group` of each row of the data.
    """

    recipe: str
    method: str
    model: str
    target: Target
    parameters: int
    trained: int
    precision: str
    layout: str
    size: int
    accumulation: int
    wanted: int
    total: int
    checkpointing: bool
    steps: int
    epochs: float
    shown: str
    device: Device
    moment: str
    table: dict[str, tuple[Device, str]]
    counts: Counts | None = None
    group: int = 1
    partial: bool = False  # sums lack what could not be told, so that nothing is known to fit
    choice: Choice | None = None
    command: str | None = None
    ways_out: list[str] = field(default_factory=list)
    calibration: Steps | None = None
    seconds: float | None = None
    estimated: tuple[float, float] | None = None
    machine: Machine | None = None
    doctor: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def fits(self, device: Device) -> bool | None:
        """Whether a device's memory holds this; None where that is not known."""
        memory = self.target.memory
        if memory is None or (self.partial and device.total <= usable(memory)):
            return None
        return device.total <= usable(memory)

    def as_dict(self) -> dict[str, Any]:
        """The plan as JSON takes it."""
        memory = self.target.memory
        return {
            "recipe": self.recipe,
            "method": self.method,
            "model": self.model,
            "devices": self.target.devices,
            "memory": memory,
            "parameters": self.parameters,
            "trained_parameters": self.trained,
            "precision": self.precision,
            "layout": self.layout,
            "batch": {
                "per_device_train_batch_size": self.size,
                "gradient_accumulation_steps": self.accumulation,
                "rows_a_step": self.total,
                "activation_checkpointing": self.checkpointing,
            },
            "steps": self.steps,
            "epochs": self.epochs,
            "data": None if self.counts is None else {**vars(self.counts), "padding": self.counts.padding},
            "configs": {
                name: {
                    "moment": moment,
                    "parts": device.parts,
                    "total": device.total,
                    "host": device.host,
                    "fits": self.fits(device),
                }
                for name, (device, moment) in self.table.items()
            },
            "suggestion": None if self.choice is None else _choice(self.choice, self.command),
            "ways_out": self.ways_out,
            "calibration": None if self.calibration is None else vars(self.calibration),
            "seconds": self.seconds,
            "estimated_seconds": None if self.estimated is None else list(self.estimated),
            "shown": self.shown,
            "doctor": self.doctor,
            "notes": self.notes,
        }


def _choice(choice: Choice, line: str | None) -> dict[str, Any]:
    return {
        "config": choice.config,
        "per_device_train_batch_size": choice.size,
        "gradient_accumulation_steps": choice.accumulation,
        "activation_checkpointing": choice.checkpointing,
        "total": choice.device.total,
        "parts": choice.device.parts,
        "command": line,
    }


def plan(
    recipe: Recipe,
    target: Target,
    *,
    rows: int | None = None,
    calibrate: bool | None = None,
    given: Iterable[str] = (),
) -> Plan:
    """Tell what a recipe takes on a target.

    `rows` takes the place of reading the data; `calibrate` None: a few real steps are run where the plan is for this
    machine, the data were read and the model is small. `given` are the overrides that the recipe has, for the line to
    run. Raises UserError for what cannot be read.
    """
    refuse_endless(recipe, recipe.training_config())
    if recipe.method.of_images:
        from llmalign.plan.images import image_plan  # text users have no need of diffusers

        engine: Any = image_plan(recipe, target, rows)
        made = _image(engine)
    else:
        config = recipe.training_config()
        with config.main_process_first(desc="looking for the model"):
            path = model_path(str(recipe.model_config().model_name_or_path))
        engine = TextPlan(text_facts(recipe, target, path, rows))
        made = _text(engine)
    _suggest(made, engine, recipe, given)
    read = not any("were not read" in note for note in made.notes)
    here = target.memory is None
    if calibrate or (calibrate is None and here and read and target.devices == 1 and made.parameters <= SMALL):
        if not read:
            raise UserError("--calibrate runs real steps, for which the data and the model have to be there")
        made.calibration = calibrated(_as_told(recipe, made), None if recipe.method.of_images else engine.facts.lengths)
        made.seconds = made.steps * made.calibration.step(made.accumulation)
    return made


def _as_told(recipe: Recipe, made: Plan) -> Recipe:
    """The recipe with the batch that the plan tells of."""
    if made.choice is None:
        return recipe
    own = {"per_device_train_batch_size": made.size, "gradient_accumulation_steps": made.accumulation}
    return replace(recipe, config={**recipe.config, **own, "activation_checkpointing": made.checkpointing})


def _counted(made: Plan, engine: Any) -> None:
    """Rows and number of the steps, from the batch that the plan tells of."""
    made.total = made.size * made.accumulation * made.target.devices
    made.steps = engine.steps(made.size, made.accumulation)
    made.epochs = engine.epochs(made.steps * made.total)


def _text(engine: TextPlan) -> Plan:
    facts = engine.facts
    args, target = facts.config, facts.target
    size, accumulation = args.per_device_train_batch_size, args.gradient_accumulation_steps
    total = size * accumulation
    if target.devices > 1:
        accumulation = accumulation_for(total, size, target.devices)
    configs = configs_for(engine, target.devices)
    table = {name: engine.device(name, size, accumulation, checkpointing=facts.checkpointing) for name in configs}
    batch = max(size // facts.group, 1) if facts.kind == PROMPTS else size
    counts = counted(engine.rows, engine.layout, batch, repeats=engine.layout != SHARED_PROMPT)
    made = Plan(
        recipe=facts.recipe.path,
        method=facts.method,
        model=str(facts.recipe.model["model_name_or_path"]),
        target=target,
        parameters=facts.weights.count,
        trained=facts.weights.trained,
        precision=_precision(facts.bf16, str(facts.outline.dtype)),
        layout=engine.layout,
        size=size,
        accumulation=accumulation,
        wanted=total,
        total=total,
        checkpointing=facts.checkpointing,
        steps=0,
        epochs=0.0,
        shown=configs[0],
        device=table[configs[0]][0],
        moment=table[configs[0]][1],
        table=table,
        counts=counts,
        group=facts.group if facts.kind == PROMPTS else 1,
        doctor={name: report.as_dict() for name, report in facts.reports.items()},
        notes=facts.notes,
    )
    _counted(made, engine)
    if target.cuda:
        made.machine = H100
        made.estimated = _estimated(engine, made)
    return made


def _precision(bf16: bool, dtype: str) -> str:
    held = dtype.removeprefix("torch.")
    return f"weights in {held}, computed in {'bfloat16' if bf16 else held}"


def _estimated(engine: TextPlan, made: Plan) -> tuple[float, float]:
    """Seconds of the run on such machines, sending hidden behind computing and not."""
    facts, counts = engine.facts, made.counts
    assert counts is not None
    config = facts.outline.config.get_text_config()
    heads = config.num_attention_heads
    width = (config.to_dict().get("head_dim") or config.hidden_size // heads) * heads * facts.outline.layers
    share = made.total / made.group / max(counts.rows, 1)
    work = work_of(engine.rows, engine.layout, counts.fed) * share
    name = made.choice.config if made.choice is not None else next(iter(made.table))
    frozen = int(engine.scores_reference and not engine.ahead(name))
    if facts.kind == PROMPTS:
        frozen += 2  # the sampler's scores, and reading each token once as it is sampled
    done = operations(
        work,
        body=facts.weights.count - facts.weights.outside,
        head=0 if facts.outline.scorer else config.hidden_size * facts.outline.vocabulary,
        width=width,
        adapter=facts.outline.adapter is not None,
        checkpointing=made.checkpointing,
        frozen=frozen,
    )
    devices = made.target.devices
    size = 2 if facts.bf16 else 4
    reference = facts.weights.count * frozen if facts.kind != PROMPTS else 0
    sent = communication(name, devices, facts.weights.count, facts.weights.trained, size, reference)
    if name not in (DDP, ZERO1):  # which reduce once a step
        sent *= made.accumulation
    machine = made.machine
    assert machine is not None
    low, high = step_seconds(done / devices, sent, machine, devices)
    return low * made.steps, high * made.steps


def _image(engine: Any) -> Plan:
    args, target = engine.config, engine.target
    size, accumulation = args.per_device_train_batch_size, args.gradient_accumulation_steps
    total = size * accumulation
    if target.devices > 1:
        accumulation = accumulation_for(total, size, target.devices)
    configs = configs_for(engine, target.devices)
    table = {name: engine.device(name, size, accumulation, checkpointing=engine.checkpointing) for name in configs}
    side = engine.resolution
    made = Plan(
        recipe=engine.recipe.path,
        method=engine.recipe.method.name,
        model=engine.outline.path,
        target=target,
        parameters=engine.weights.count,
        trained=engine.weights.trained,
        precision=_precision(engine.bf16, str(engine.outline.dtype)),
        layout=f"two pictures of {side} x {side} a row, {engine.rows_of_run:,} rows",
        size=size,
        accumulation=accumulation,
        wanted=total,
        total=total,
        checkpointing=engine.checkpointing,
        steps=0,
        epochs=0.0,
        shown=configs[0],
        device=table[configs[0]][0],
        moment=table[configs[0]][1],
        table=table,
        notes=engine.notes,
    )
    _counted(made, engine)
    return made


def _suggest(made: Plan, engine: Any, recipe: Recipe, given: Iterable[str]) -> None:
    """What fits, and the line that runs it; where nothing does, what would."""
    memory = made.target.memory
    made.partial = engine.partial
    if memory is None or made.partial:
        return

    def measure(config: str, size: int, accumulation: int, checkpointing: bool) -> tuple[Device, str]:
        return engine.device(config, size, accumulation, checkpointing=checkpointing)

    unit = recipe.training_config().num_generations if recipe.method.kind == PROMPTS else 1
    made.choice = choose(
        made.table,
        measure,
        memory=memory,
        size=made.size,
        total=made.wanted,
        devices=made.target.devices,
        checkpointing=made.checkpointing,
        unit=unit,
        floor=engine.floor,
    )
    if made.choice is not None:
        made.shown, made.device, made.moment = made.choice.config, made.choice.device, made.choice.moment
        made.size, made.accumulation = made.choice.size, made.choice.accumulation
        made.checkpointing = made.choice.checkpointing
        _counted(made, engine)
        made.command = command(recipe.path, made.choice, made.target.devices, given)
        if made.machine is not None and isinstance(engine, TextPlan):
            made.estimated = _estimated(engine, made)
        return
    made.ways_out = list(_ways_out(made, engine, recipe))


def _ways_out(made: Plan, engine: Any, recipe: Recipe) -> Iterable[str]:
    """What would fit: an adapter, four bits, more devices, shorter rows."""
    memory, devices = made.target.memory or 0.0, made.target.devices
    if isinstance(engine, TextPlan):
        options = recipe.model
        if not options.get("use_peft"):
            narrow = {"dtype": "bfloat16"} if engine.facts.bf16 and "dtype" not in options else {}  # as it is chosen
            less = {**options, **narrow, "use_peft": True, "lora_dropout": 0.0}
            yield from _if_fits("an adapter (--use_peft true)", replace(recipe, model=less), made.target)
            less["load_in_4bit"] = True
            yield from _if_fits(
                "an adapter on 4-bit weights (and --load_in_4bit true)", replace(recipe, model=less), made.target
            )
        elif not options.get("load_in_4bit"):
            less = {**options, "load_in_4bit": True}
            yield from _if_fits("4-bit weights (--load_in_4bit true)", replace(recipe, model=less), made.target)
        more = devices
        while more < 512:
            more *= 2
            engine.facts.target = replace(made.target, devices=more)
            known = configs_for(engine, more)
            for name in (FSDP2, ZERO3):
                if name in known and engine.floor(name) <= usable(memory):
                    device, _ = engine.device(name, _least(recipe), 1, checkpointing=True)
                    if device.total <= usable(memory):
                        engine.facts.target = made.target
                        yield f"{more} devices with {name} and {_least(recipe)} row at a time"
                        more = 512
                        break
        engine.facts.target = made.target
    yield (
        "shorter rows (max_length, max_completion_length) or a smaller model"
        if isinstance(engine, TextPlan)
        else "an adapter (--use_peft true), a smaller resolution, or a smaller model"
    )


def _least(recipe: Recipe) -> int:
    return recipe.training_config().num_generations if recipe.method.kind == PROMPTS else 1


def _if_fits(words: str, recipe: Recipe, target: Target) -> Iterable[str]:
    path = model_path(str(recipe.model_config().model_name_or_path))
    engine = TextPlan(text_facts(recipe, target, path, 1000))
    known = configs_for(engine, target.devices)
    memory = usable(target.memory or 0.0)
    for name in known:
        if engine.floor(name) > memory:
            continue
        device, _ = engine.device(name, _least(recipe), 2, checkpointing=True)
        if device.total <= memory:
            yield f"{words}, with {name} and {_least(recipe)} row at a time"
            return


def this_machine(cuda: bool) -> float:
    """Bytes of memory of this machine's first GPU, or of the machine."""
    if cuda:
        import torch

        return float(torch.cuda.get_device_properties(0).total_memory)
    return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
