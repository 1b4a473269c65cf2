"""How the parts of a run are spread over devices, config by config (`accelerate_configs/`), in bytes a device.

N devices. Under `bf16` DeepSpeed's engines hold the weights in bfloat16 and step on a float32 copy; DDP and one process
keep those that are trained as they were loaded (in float32, unless the recipe has another dtype), FSDP2 in float32, and
compute in bfloat16.

    single, ddp      weights, gradients and state whole; DDP adds its buckets, as large as the gradients
    zero1            weights and gradients whole in bfloat16; float32 weights and state / N
    zero2            gradients / N as well
    zero2_offload    float32 weights and state / N in the host's memory
    zero3            weights / N as well; what is gathered at a time: at most 1e9 numbers, the engine's limit
    fsdp2            float32 weights, gradients and state / N; gathered: two layers, and what belongs to no layer

Buckets of DeepSpeed hold 5e8 numbers each, or all that there are, two of them where reducing goes on meanwhile.
"""

from dataclasses import dataclass, field

from llmalign.plan.outline import Weights
from llmalign.plan.trace import Peak

SINGLE, DDP, ZERO1, ZERO2, OFFLOAD, ZERO3, FSDP2 = CONFIGS = (
    "single", "ddp", "zero1", "zero2", "zero2_offload", "zero3", "fsdp2",
)  # fmt: skip
DEEPSPEED = (ZERO1, ZERO2, OFFLOAD, ZERO3)
#: configs under which the reference's log-probs are never chosen to be computed ahead of training
SHARDED = (*DEEPSPEED, FSDP2)
BUCKET, LIVE = 5e8, 1e9  # DeepSpeed's defaults, in numbers
CONTEXT, CHANNELS = 1e9, 5e8  # bytes: CUDA and its libraries; NCCL, on several devices. Usual sizes, not measured here


@dataclass(frozen=True)
class Held:
    """What one run holds whatever its config. `state`: the optimizer's, for weights in float32."""

    weights: Weights
    state: float
    bf16: bool = False
    frozen: dict[str, Weights] = field(default_factory=dict)
    #: networks beside the policy that are trained and never sharded, all of their bytes
    beside: dict[str, float] = field(default_factory=dict)


@dataclass
class Device:
    """Bytes of one device by part, and what the host holds for it."""

    parts: dict[str, float]
    host: float = 0.0

    @property
    def total(self) -> float:
        """All parts on the device together."""
        return sum(self.parts.values())


def spread(config: str, devices: int, held: Held, peak: Peak, *, cuda: bool = True) -> Device:
    """Parts on one of `devices` while a pass is at its `peak`."""
    parts, host = _states(config, devices, held, peak)
    shared = devices if config in (ZERO3, FSDP2) else 1
    for name, weights in held.frozen.items():
        size = weights.count * 2.0 if config in DEEPSPEED and held.bf16 else weights.bytes
        parts[name] = size / shared
    parts |= held.beside
    parts["activations"] = peak.activations
    parts["logits"] = peak.logits
    if peak.copies:
        parts["bfloat16 copies of the weights"] = peak.copies
    if cuda:
        parts["CUDA context"] = CONTEXT + (CHANNELS if devices > 1 else 0)
    return Device({name: size for name, size in parts.items() if size}, host)


def _states(config: str, devices: int, held: Held, peak: Peak) -> tuple[dict[str, float], float]:
    """Weights, gradients, optimizer and what is gathered or reduced, a device; and the host's share."""
    weights, trained = held.weights, held.weights.trained
    if config in (SINGLE, DDP):
        # torch's optimizers keep a state that is as wide as the weights
        state = held.state * min(weights.trained_bytes / max(4.0 * trained, 1.0), 1.0)
        parts = {"weights": weights.bytes, "gradients": peak.gradients, "optimizer": state}
        if config == DDP:
            parts["gradients"] = weights.trained_bytes
            parts["DDP's buckets"] = weights.trained_bytes
        return parts, 0.0
    size = 2 if held.bf16 else 4
    if config == FSDP2:
        outside, layer = min(weights.outside, weights.count), weights.largest_layer
        gathered = (outside + 2 * layer) * size
        share = min(weights.trained / max(weights.count, 1), 1.0)
        width = 4.0 if held.bf16 else weights.trained_bytes / max(trained, 1)
        own = width * trained
        return {
            "weights": (weights.bytes - weights.trained_bytes + own) / devices,
            "gradients": own / devices,
            "optimizer": held.state * width / 4 / devices,
            "gathered weights": gathered,
            "gradients before they are reduced": (outside + layer) * size * share,
        }, 0.0
    held_weights = _engine_bytes(weights, size)
    states = held.state + 4.0 * trained  # the float32 weights that the optimizer steps on
    bucket = min(BUCKET, trained) * size
    parts = {"weights": held_weights, "gradients": trained * size, "optimizer": states / devices}
    if config == ZERO1:
        parts["buckets"] = bucket
    elif config in (ZERO2, OFFLOAD):
        parts["gradients"] = trained * size / devices
        parts["buckets"] = 2 * bucket
    else:
        parts["weights"] = held_weights / devices
        parts["gradients"] = trained * size / devices
        parts["buckets"] = bucket
        largest = max(weights.largest_layer, weights.outside / 2)
        parts["gathered weights"] = max(min(LIVE, weights.count), largest) * held_weights / max(weights.count, 1)
    if config == OFFLOAD:
        host = parts.pop("optimizer") + parts["gradients"] * 4 / size
        return parts, host
    return parts, 0.0


def _engine_bytes(weights: Weights, size: int) -> float:
    """Weights as an engine holds them: in its own precision, quantized ones as they are."""
    quantized = weights.bytes < weights.count * 1.5
    return weights.bytes if quantized else weights.count * float(size)
