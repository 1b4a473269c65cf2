"""The memory of a run by part, from numbers alone: weights, gradients, the optimizer's state, frozen models, passes.

All sizes are bytes. What belongs to which part, and how many bytes a number of it has, is said here; how parts are
spread over devices is `sharding`.
"""

GB = 1e9

#: bytes of optimizer state for each number that is trained, by transformers' names, weights in float32
STATES: dict[str, float] = {
    "adamw_torch": 8, "adamw_torch_fused": 8, "adamw_anyprecision": 8, "adamw_torch_8bit": 2, "adamw_torch_4bit": 1,
    "adamw_bnb_8bit": 2, "adamw_8bit": 2, "paged_adamw_32bit": 8, "paged_adamw_8bit": 2, "lion_32bit": 4,
    "lion_8bit": 1, "paged_lion_32bit": 4, "paged_lion_8bit": 1, "ademamix": 12, "ademamix_8bit": 3,
    "paged_ademamix_32bit": 12, "paged_ademamix_8bit": 3, "sgd": 0, "rmsprop": 4, "rmsprop_bnb": 4,
    "rmsprop_bnb_32bit": 4, "rmsprop_bnb_8bit": 1, "adagrad": 4,
}  # fmt: skip
FACTORED = "adafactor"
#: optimizers that go over lists of tensors on a GPU and hold one more copy of the weights meanwhile
FOREACH = ("adamw_torch",)


def optimizer_state(name: str, shapes: list[tuple[int, ...]], momentum: bool = False) -> float | None:
    """Bytes of an optimizer's state for trained tensors of these shapes; None for one that is not known here.

    Adafactor keeps a row and a column of a matrix, and a whole tensor of all else.
    """
    numbers = sum(_count(shape) for shape in shapes)
    if name == FACTORED:
        return float(sum(4 * (sum(shape) if len(shape) == 2 else _count(shape)) for shape in shapes))
    if name not in STATES:
        return None
    return numbers * (STATES[name] + 4 * (name == "sgd" and momentum))


def _count(shape: tuple[int, ...]) -> int:
    count = 1
    for side in shape:
        count *= side
    return count


def generation_cache(layers: int, kv_heads: int, head_size: int, itemsize: float, rows: int, tokens: int) -> float:
    """Keys and values of `rows` sequences of `tokens` tokens."""
    return 2.0 * layers * kv_heads * head_size * itemsize * rows * tokens


def sampling_logits(rows: int, vocabulary: int) -> float:
    """One step of sampling: the model's logits, in float32, after the temperature, and their probabilities."""
    return 4.0 * 4 * rows * vocabulary


def head_logits(scored: int, vocabulary: int, chunk: int = 2**26, itemsize: int = 2) -> float:
    """A compact head on a GPU at its worst moment, the last chunk's backward pass.

    `chunk` logits are held at a time: in float32 their log-probabilities, the gradient of those and that of the logits,
    and the logits' gradient once more in the precision of the computation.
    """
    if not scored:
        return 0.0
    rows = max(chunk // vocabulary, 1)
    chunks = -(-scored // rows)
    return -(-scored // chunks) * vocabulary * (3.0 * 4 + itemsize)
