"""Sequence log-probs of text: sums over completion tokens, EOS included, prompt and padding excluded."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.distributed import ReduceOp, all_reduce
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint
from transformers import PretrainedConfig, PreTrainedModel
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from llmalign.scores.prefix import Layout, joined
from llmalign.types import PromptGroups

#: logits held at a time, in numbers: few enough for a CPU's cache, enough to fill an accelerator
CPU_CHUNK, DEVICE_CHUNK = 2**22, 2**26
#: of so many last chunks the log-probs stay for the backward pass, instead of being computed again: 48 and 256 MiB
CPU_KEPT, DEVICE_KEPT = 3, 1
_ATTACHED = "_has_compact_head"


@dataclass(frozen=True)
class LogitRule:
    """What is done to logits after the head: times `scale`, squeezed into (-softcap, softcap), over `temperature`."""

    scale: float = 1.0
    softcap: float | None = None
    temperature: float = 1.0

    @classmethod
    def of(cls, config: PretrainedConfig, temperature: float = 1.0) -> "LogitRule":
        """Read the rule from a model's config; families name their factor differently."""
        known = config.get_text_config().to_dict()
        scale = next((known[k] for k in ("logit_scale", "output_multiplier", "lm_head_multiplier") if known.get(k)), 1)
        divisor = known.get("logits_scaling")
        if divisor is not None:
            scale = divisor if known.get("model_type") == "hyperclovax" else 1 / divisor
        return cls(scale, known.get("final_logit_softcapping"), temperature)

    def __call__(self, logits: Tensor) -> Tensor:
        """Apply the rule to float32 logits."""
        if self.scale != 1:
            logits = logits * self.scale
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        return logits if self.temperature == 1 else logits / self.temperature


def most_over_ranks(calls: int, device: torch.device) -> int:
    """How often all ranks have to call a part of the model where one calls it so often.

    Under ZeRO-3 every call gathers weights from all ranks, so that unequal numbers would wait for ever.
    """
    if not is_deepspeed_zero3_enabled():
        return calls
    most = torch.tensor(calls, device=device)
    all_reduce(most, ReduceOp.MAX)
    return int(most)


def head_logps(head: Any, hidden: Tensor, targets: Tensor, rule: LogitRule) -> Tensor:
    """Log-probs (S,) in nats, float32, of `targets` (S,) after hidden states (S, H), through a language model's head.

    Logits exist for one chunk at a time, in the backward pass too, which computes them again; those of a few last
    chunks are kept, since it begins with them. The head is called as a module, so that whatever it is (tied, biased,
    quantized, with an adapter, sharded) works as it does in the model.
    """
    vocabulary = head.out_features
    numbers, kept = (CPU_CHUNK, CPU_KEPT) if hidden.device.type == "cpu" else (DEVICE_CHUNK, DEVICE_KEPT)
    at_a_time = max(numbers // vocabulary, 1)
    chunks = most_over_ranks(max(-(-len(targets) // at_a_time), 1), hidden.device)

    def logps(rows: Tensor, wanted: Tensor) -> Tensor:
        return -nn.functional.cross_entropy(rule(head(rows).float()), wanted, reduction="none")

    pieces = list(zip(hidden.tensor_split(chunks), targets.tensor_split(chunks), strict=True))
    if not torch.is_grad_enabled():
        return torch.cat([logps(*piece) for piece in pieces])
    # Sharded weights are empty while they are not in use, which the default check would take for a difference.
    options: Any = {"use_reentrant": False, "preserve_rng_state": False, "determinism_check": "none"}
    again = [checkpoint(logps, *piece, **options) for piece in pieces[:-kept]]
    return torch.cat([*again, *(logps(*piece) for piece in pieces[-kept:])])


def add_compact_head(model: PreTrainedModel, temperature: float = 1.0) -> None:
    """Let `model(..., scored=, targets=)` return the log-probs (S,) of the targets instead of logits.

    `scored` (S,) are positions in the flattened hidden states; the log-probs are those of sampling at `temperature`.
    With `reader=`, a submodule's name, what that makes of the hidden states (S, H) there comes beside them. Without
    `scored` the forward is the original one. Called once, before the model is wrapped by PEFT, DDP or DeepSpeed; calls
    go through the wrapper.
    """
    vars(model)[_ATTACHED] = True
    rule = LogitRule.of(model.config, temperature)

    @functools.wraps(type(model).forward)
    def forward(
        self: PreTrainedModel,
        *args: Any,
        scored: Tensor | None = None,
        targets: Tensor | None = None,
        reader: str | None = None,
        **kwargs: Any,
    ) -> Any:
        if scored is None or targets is None:
            # The class's own: a bound one would still be the original's in a deep copy of the model.
            return type(self).forward(self, *args, **kwargs)
        hidden = self.base_model(*args, use_cache=False, **kwargs).last_hidden_state
        rows = hidden.flatten(0, 1).index_select(0, scored)
        logps = head_logps(self.get_output_embeddings(), rows, targets, rule)
        return logps if reader is None else (logps, self.get_submodule(reader)(rows))

    model.forward = MethodType(forward, model)


def is_attached(model: PreTrainedModel) -> bool:
    """Whether a model, or the one that it is a copy of, has a compact head."""
    return _ATTACHED in vars(model)


def lay_out_padded(
    groups: PromptGroups, *, pad_token_id: int, device: torch.device, multiple_of: int | None = None
) -> Layout:
    """Lay every prompt with one completion out as a row of its own, padded on the right to the longest.

    The last token of a completion is not fed: no score depends on what follows it.
    """
    sequences = groups.sequences()
    fed = [torch.tensor(prompt + completion[:-1]) for prompt, completion in sequences]
    input_ids = pad_sequence(fed, batch_first=True, padding_value=pad_token_id)
    attention_mask = pad_sequence([torch.ones_like(ids) for ids in fed], batch_first=True)
    if multiple_of:
        missing = -input_ids.shape[1] % multiple_of
        input_ids = nn.functional.pad(input_ids, (0, missing), value=pad_token_id)
        attention_mask = nn.functional.pad(attention_mask, (0, missing))
    width = input_ids.shape[1]
    scored = [
        torch.arange(len(prompt) - 1, len(prompt) + len(completion) - 1) + row * width
        for row, (prompt, completion) in enumerate(sequences)
    ]
    tokens = [token for _, completion in sequences for token in completion]
    inputs = {"input_ids": input_ids.to(device), "attention_mask": attention_mask.to(device)}
    targets = torch.tensor(tokens, dtype=torch.long, device=device)
    return Layout(inputs, joined(scored, device), targets, groups.lengths())


def completion_logps(token_logps: Tensor, lengths: Sequence[int]) -> Tensor:
    """Sum per-token log-probs (S,), sequence by sequence, to sequence log-probs (N,) in nats, float32.

    The sum runs in float32 whatever the input's dtype: in bfloat16 a sum over 500 tokens loses about one nat.
    """
    return torch.stack([own.sum() for own in token_logps.float().split(list(lengths))])


@torch.no_grad()
def sequence_logps(
    model: nn.Module,
    sequences: Sequence[tuple[Sequence[int], Sequence[int]]],
    *,
    pad_token_id: int,
    batch_size: int = 16,
) -> Tensor:
    """Score (prompt ids, completion ids) pairs: log pi(completion | prompt), (N,) float32 on the CPU, in nats.

    Padding goes to the right and sequences are batched by length, so that the result does not depend on the order.
    The model's mode is put back afterwards. Not covered: gradients, images, sequences beyond the model's context.
    Raises ValueError where a prompt is empty, since its completion's first token then has no context.
    """
    for row, (prompt, _) in enumerate(sequences):
        if len(prompt) == 0:
            raise ValueError(f"sequence {row} has an empty prompt; start it with the BOS token")
    language_model: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    rule, head = LogitRule.of(language_model.config), language_model.get_output_embeddings()
    order = sorted(range(len(sequences)), key=lambda i: len(sequences[i][0]) + len(sequences[i][1]))
    result = torch.zeros(len(sequences), dtype=torch.float32)
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        groups = PromptGroups([list(sequences[i][0]) for i in rows], [[list(sequences[i][1])] for i in rows])
        layout = lay_out_padded(groups, pad_token_id=pad_token_id, device=device)
        hidden = language_model.base_model(**layout.inputs, use_cache=False).last_hidden_state.flatten(0, 1)
        token_logps = head_logps(head, hidden.index_select(0, layout.scored), layout.targets, rule)
        result[rows] = completion_logps(token_logps, layout.lengths).cpu()
    model.train(was_training)
    return result
