"""Critics of PPO: what the rest of a completion will bring, read where each of its tokens is predicted."""

import copy
import logging
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel, TrainerCallback
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from transformers.modeling_layers import GenericForSequenceClassification

from llmalign.errors import UserError
from llmalign.processes import fail_together
from llmalign.rewards.classifiers import load_classifier, reward_statistics
from llmalign.rewards.functions import Guarded
from llmalign.rewards.model import ModelReward
from llmalign.scores.prefix import IMPLEMENTATIONS, register_attention
from llmalign.scores.scoring import AUTO, PADDED, Scorer, why_not
from llmalign.trainers.text_scores import TextScores
from llmalign.types import PromptGroups

logger = logging.getLogger(__name__)

CRITIC_FILE = "critic.safetensors"
VALUE_HEAD = "value_head"


class ValueHead(nn.Module):
    """A linear value of hidden states (S, H): (S,), float32. It begins at zero, so that nothing is drawn for it."""

    def __init__(self, width: int, device: torch.device) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width, device=device))
        self.bias = nn.Parameter(torch.zeros(1, device=device))

    def forward(self, hidden: Tensor) -> Tensor:
        """Not under autocast: bfloat16 has three digits, and the advantages are differences of values."""
        with torch.autocast(hidden.device.type, enabled=False):
            return (hidden.to(self.weight.dtype) @ self.weight + self.bias).float()


class ClassifierValues(nn.Module):
    """A sequence classifier's own head at every position: (r - mean) / std, with its config's statistics.

    Called as a language model with a compact head is; `targets` are not needed for values.
    """

    def __init__(self, classifier: PreTrainedModel, *, normalize: bool) -> None:
        super().__init__()
        self.classifier: Any = classifier
        self.mean, self.std = reward_statistics(classifier.config) if normalize else (0.0, 1.0)

    def forward(self, *, scored: Tensor, targets: Tensor, **inputs: Any) -> Tensor:
        """Values (S,) at the positions `scored` of the flattened hidden states, float32."""
        hidden = self.classifier.base_model(**inputs, use_cache=False).last_hidden_state
        with torch.autocast(hidden.device.type, enabled=False):  # as in ValueHead
            raw = self.classifier.score(hidden.flatten(0, 1).index_select(0, scored).float()).squeeze(-1)
        return (raw - self.mean) / self.std


class Critic:
    """The part of a trainer that estimates values: its weights, and their file in a checkpoint."""

    module: nn.Module

    def parameters(self) -> list[nn.Parameter]:
        """What is trained, in the order of the optimizer's group."""
        return list(self.module.parameters())

    def save(self, folder: Path, *, writes: bool) -> None:
        """Write the weights into a checkpoint; all ranks call it, `writes` is true on one."""
        with _whole(self.parameters()):
            weights = {name: weight.detach().cpu().contiguous() for name, weight in self.module.named_parameters()}
        if writes:
            save_file(weights, folder / CRITIC_FILE)

    def load(self, folder: Path) -> None:
        """Take the weights of a checkpoint; all ranks call it. UserError where they are missing or another critic's."""
        file = folder / CRITIC_FILE
        missing = f"{folder} holds no {CRITIC_FILE}, the weights of its critic, so the run cannot go on where it was"
        way_out = "resume from another checkpoint, or start again in a new output_dir."
        fail_together(None if file.is_file() else f"{missing}; {way_out}")
        kept, own = load_file(file), dict(self.module.named_parameters())
        if {name: weight.shape for name, weight in kept.items()} != {name: w.shape for name, w in own.items()}:
            raise UserError(f"{file} is of another critic than this run's; resume with the critic that it was made by.")
        with torch.no_grad():
            for name, weight in own.items():
                weight.copy_(kept[name])


class HeadCritic(Critic):
    """A value head on a language model's trunk, as a submodule of it, so that DDP and ZeRO train it with the policy.

    It is left out of what is saved as the model's weights. Values come from the policy's own pass: the model is called
    with `reader=VALUE_HEAD`.
    """

    def __init__(self, model: nn.Module) -> None:
        language_model: Any = model.get_base_model() if isinstance(model, PeftModel) else model
        head = language_model.get_output_embeddings()
        self.module = ValueHead(head.in_features, head.weight.device)
        language_model.add_module(VALUE_HEAD, self.module)
        own = {f"{VALUE_HEAD}.{name}" for name, _ in self.module.named_parameters()}
        language_model._keys_to_ignore_on_save = own | set(language_model._keys_to_ignore_on_save or ())
        self._model = language_model

    @contextmanager
    def set_aside(self) -> Iterator[None]:
        """The model without its head, for an engine that takes the model's weights by name."""
        delattr(self._model, VALUE_HEAD)
        try:
            yield
        finally:
            self._model.add_module(VALUE_HEAD, self.module)


class ModelCritic(TextScores, Critic):
    """A network of its own, started from a reward model: that model's head over its own trunk at every position.

    Prompts are shared where the architecture is proven for it, checked on the first batch, else rows are padded. It is
    wrapped for DDP. Not covered: ZeRO, FSDP.
    """

    def __init__(
        self, classifier: PreTrainedModel, *, args: Any, accelerator: Accelerator, pad_token_id: int, normalize: bool
    ) -> None:
        self.args, self.accelerator = args, accelerator
        requested = PADDED if args.scoring == PADDED else AUTO
        self.scorer = Scorer(requested, pad_token_id=pad_token_id, pad_to_multiple_of=args.pad_to_multiple_of)
        self.scorer.choose(classifier.config)
        if why_not(classifier.config) is None:
            register_attention()
            current = classifier.config._attn_implementation
            classifier.set_attn_implementation(IMPLEMENTATIONS.get(current, current))
        classifier.requires_grad_(True).eval()
        if args.activation_checkpointing or args.gradient_checkpointing:
            for part in classifier.modules():
                if isinstance(part, nn.Dropout):
                    part.p = 0.0
                if "attention_dropout" in vars(part):  # attention kernels take it as a number
                    part.attention_dropout = 0.0
            classifier.train().activation_checkpointing_enable()  # which works in training mode alone
        self.module = ClassifierValues(classifier, normalize=normalize)
        self.wrapped = accelerator.prepare_model(self.module)
        logger.info(
            "Critic: %s, %s parameters trained at %g; the second line on scoring is its own.",
            type(classifier).__name__, f"{sum(map(torch.numel, self.parameters())):,}", args.critic_learning_rate,
        )  # fmt: skip

    def go_on_as(self, kind: str) -> None:
        """Read in the layout that a run began with, without choosing again: another batch might choose another."""
        self.scorer.kind, self.scorer.reason = kind, "as the run began"
        self._layout_checked = True

    def values(self, groups: PromptGroups) -> Tensor:
        """Values (S,) where each token of all completions is predicted, completion by completion."""
        return self.policy_token_logps(self.wrapped, groups)


class CriticGradients(TrainerCallback):
    """Clears the gradients of a network that Trainer does not know, after each step of the optimizer they share."""

    def __init__(self, critic: Critic) -> None:
        self._critic = critic

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Between micro-batches they add up, as the policy's do."""
        self._critic.module.zero_grad()


def starting_point(given: Any, args: Any, reward_funcs: Iterable[Any], tokenizer: Any) -> Any:
    """A copy of the reward model that a critic starts from, in float32, as all weights that are trained themselves.

    `given` is a classifier, a path or a Hub name; else it is `critic_model_name_or_path`, else the first reward model
    among the functions. Raises UserError where there is none, where its head is not the usual one, and where it does
    not read the policy's tokens.
    """
    source = given if given is not None else args.critic_model_name_or_path
    own_tokenizer = None
    if source is None:
        models = [one for one in map(unguarded, reward_funcs) if isinstance(one, ModelReward)]
        if not models:
            raise UserError(
                "critic: model starts from a reward model and none is named: set critic_model_name_or_path or "
                "reward_models, or set critic: head"
            )
        classifier, own_tokenizer = copy.deepcopy(models[0].model), models[0].tokenizer
    elif isinstance(source, str):
        classifier, own_tokenizer = load_classifier(
            source, dtype=torch.float32, trust_remote_code=args.trust_remote_code
        )
    else:
        classifier = copy.deepcopy(source)
    if classifier.config.num_labels != 1:
        raise UserError(f"a critic gives one number, this one has {classifier.config.num_labels} labels")
    if not isinstance(classifier, GenericForSequenceClassification):
        raise UserError(
            f"a critic reads a linear head over a decoder at every position, and {type(classifier).__name__} has "
            "another; set critic: head"
        )
    other = own_tokenizer is not None and own_tokenizer.get_vocab() != tokenizer.get_vocab()
    if other or classifier.get_input_embeddings().num_embeddings < len(tokenizer):
        raise UserError(
            "the critic's reward model has another vocabulary than the policy, whose tokens it would have to read; "
            "name one with the policy's tokenizer (critic_model_name_or_path), or set critic: head"
        )
    return classifier.float()


def unguarded(function: Any) -> Any:
    """A reward function without its guard."""
    return function.function if isinstance(function, Guarded) else function


def _whole(parameters: list[nn.Parameter]) -> AbstractContextManager[Any]:
    """Parameters that ZeRO-3 has sharded, gathered for a moment."""
    if not is_deepspeed_zero3_enabled():
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(parameters)
