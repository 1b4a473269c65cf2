"""A whole plan: what a recipe holds and takes, where it fits, and what to change; as one object that JSON can hold."""

import logging
import os
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

from llmalign.errors import UserError
from llmalign.plan.calibrate import SMALL, Steps, calibrated
from llmalign.plan.facts import PROMPTS, Target, text_facts
from llmalign.plan.rows import Counts, counted, sampled_steps, steps_of
from llmalign.plan.sharding import CONFIGS, DDP, FSDP2, SINGLE, ZERO1, ZERO3, Device
from llmalign.plan.suggest import Choice, accumulation_for, choose, command, usable
from llmalign.plan.text import TextPlan
from llmalign.plan.timing import H100, Machine, communication, operations, step_seconds, work_of
from llmalign.recipe import Recipe
from llmalign.scores.scoring import SHARED_PROMPT
from llmalign.train import model_path, refuse_endless

logger = logging.getLogger(__name__)


@dataclass
class Plan:
    """What is told of a run. Sizes are bytes, times seconds."""

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
    total: int
    checkpointing: bool
    steps: int
    epochs: float
    shown: str
    device: Device
    moment: str
    table: dict[str, tuple[Device, str]]
    counts: Counts | None = None
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
        made.calibration = calibrated(recipe, None if recipe.method.of_images else engine.facts.lengths)
        made.seconds = made.steps * made.calibration.step(made.accumulation)
    return made


def _configs(known: Iterable[str], devices: int) -> list[str]:
    return [name for name in known if (name == SINGLE) == (devices == 1)]


def _text(engine: TextPlan) -> Plan:
    facts = engine.facts
    args, target = facts.config, facts.target
    size, accumulation = args.per_device_train_batch_size, args.gradient_accumulation_steps
    total = size * accumulation
    if target.devices > 1:
        accumulation = accumulation_for(total, size, target.devices)
    configs = _configs(_allowed(engine), target.devices)
    table = {name: engine.device(name, size, accumulation, checkpointing=facts.checkpointing) for name in configs}
    if facts.kind == PROMPTS:
        steps = sampled_steps(len(facts.lengths), facts.group, args, target.devices)
    else:
        steps = steps_of(len(facts.lengths), size, accumulation, target.devices, args.num_train_epochs, args.max_steps)
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
        total=total,
        checkpointing=facts.checkpointing,
        steps=steps,
        epochs=args.num_train_epochs if args.max_steps <= 0 else args.max_steps * total / max(len(facts.lengths), 1),
        shown=configs[0],
        device=table[configs[0]][0],
        moment=table[configs[0]][1],
        table=table,
        counts=counts,
        doctor={name: report.as_dict() for name, report in facts.reports.items()},
        notes=facts.notes,
    )
    if target.cuda:
        made.machine = H100
        made.estimated = _estimated(engine, made)
    return made


def _precision(bf16: bool, dtype: str) -> str:
    held = dtype.removeprefix("torch.")
    return f"weights in {held}, computed in {'bfloat16' if bf16 else held}"


def _allowed(engine: TextPlan) -> list[str]:
    """Configs under which the method can be trained."""
    facts, known = engine.facts, list(CONFIGS)
    sharded = [name for name in known if name not in (SINGLE, DDP)]
    refused: list[str] = []
    if engine.beside:
        refused = sharded
        facts.notes.append("critic: model is one process or DDP alone")
    elif facts.method == "pf_ppo" and facts.config.advantage == "gae":
        refused = [FSDP2]
        facts.notes.append("a critic is not trained under FSDP2")
    elif facts.method == "rpo" and facts.config.base == "reference":
        refused = sharded
        facts.notes.append("base: reference cannot draw from a sharded model")
    if facts.kind == PROMPTS and facts.config.reward_models:
        refused = [*refused, ZERO3]
        facts.notes.append("reward models are not gathered under ZeRO-3")
    return [name for name in known if name not in refused]


def _estimated(engine: TextPlan, made: Plan) -> tuple[float, float]:
    """Seconds of the run on such machines, sending hidden behind computing and not."""
    facts, counts = engine.facts, made.counts
    assert counts is not None
    config = facts.outline.config.get_text_config()
    heads = config.num_attention_heads
    width = (config.to_dict().get("head_dim") or config.hidden_size // heads) * heads * facts.outline.layers
    share = made.total / max(counts.rows, 1)
    if facts.kind == PROMPTS:
        share /= facts.group
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
        sent *= made.choice.accumulation if made.choice is not None else made.accumulation
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
    configs = _configs(CONFIGS, target.devices)
    table = {name: engine.device(name, size, accumulation, checkpointing=engine.checkpointing) for name in configs}
    rows, steps = engine.steps(size * accumulation * target.devices)
    side = engine.resolution
    return Plan(
        recipe=engine.recipe.path,
        method=engine.recipe.method.name,
        model=engine.outline.path,
        target=target,
        parameters=engine.weights.count,
        trained=engine.weights.trained,
        precision=_precision(engine.bf16, str(engine.outline.dtype)),
        layout=f"two pictures of {side} x {side} a row, {rows:,} rows",
        size=size,
        accumulation=accumulation,
        total=total,
        checkpointing=engine.checkpointing,
        steps=steps,
        epochs=steps * total / max(rows, 1),
        shown=configs[0],
        device=table[configs[0]][0],
        moment=table[configs[0]][1],
        table=table,
        notes=engine.notes,
    )


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
        total=made.total,
        devices=made.target.devices,
        checkpointing=made.checkpointing,
        unit=unit,
        floor=engine.floor,
    )
    if made.choice is not None:
        made.shown, made.device, made.moment = made.choice.config, made.choice.device, made.choice.moment
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
            less = {**options, "use_peft": True, "lora_dropout": 0.0}
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
            for name in (FSDP2, ZERO3):
                if name in _allowed_again(made) and engine.floor(name) <= usable(memory):
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


def _allowed_again(made: Plan) -> Iterable[str]:
    return made.table if len(made.table) > 1 else CONFIGS


def _least(recipe: Recipe) -> int:
    return recipe.training_config().num_generations if recipe.method.kind == PROMPTS else 1


def _if_fits(words: str, recipe: Recipe, target: Target) -> Iterable[str]:
    path = model_path(str(recipe.model_config().model_name_or_path))
    engine = TextPlan(text_facts(recipe, target, path, 1000))
    known = _configs(_allowed(engine), target.devices)
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
