"""With fused_head.py all that touches names of TRL outside its public surface; held by tests/contract."""

import contextlib
import copy
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeAlias

import torch
from accelerate.utils import send_to_device
from datasets import Dataset, IterableDataset
from peft import PeftConfig, PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl import DPOTrainer, RLOOTrainer
from trl.data_utils import _tokenize, common_prefix_length
from trl.models import prepare_deepspeed, prepare_fsdp
from trl.trainer.utils import create_model_from_path, disable_dropout_in_model, use_adapter

from llmalign.data.collators import PairCollator
from llmalign.errors import UserError
from llmalign.pickles import refuse_pickles, require_safe_adapter, weight_options
from llmalign.rewards.functions import Guarded, guard
from llmalign.trainers.alarms import AlarmCallback
from llmalign.trainers.baselines import NamedEvaluations
from llmalign.trainers.batching import MicroBatchMixin
from llmalign.trainers.loading import refuse_vision, text_tokenizer
from llmalign.trainers.pair import PairTrainerMixin
from llmalign.trainers.references import References
from llmalign.trainers.rollouts import Rollout, RolloutMixin, load_state, save_state
from llmalign.trainers.safe_run import SafeRunMixin
from llmalign.trainers.startup import (
    best_of_first_set,
    brings_references,
    check_sampling,
    refuse_adapter_dropout,
    refuse_short_data,
)
from llmalign.trainers.text_scores import TextScores
from llmalign.types import PairScores, PromptGroups

logger = logging.getLogger(__name__)

AnyDataset: TypeAlias = Dataset | IterableDataset


def prepare_as_dpo(
    dataset: AnyDataset, tokenizer: PreTrainedTokenizerBase, *, max_length: int | None, num_proc: int | None, name: str
) -> AnyDataset:
    """What TRL's DPOTrainer makes of preference rows, without a trainer."""
    options = SimpleNamespace(dataset_num_proc=num_proc, max_length=max_length, truncation_mode="keep_start")
    trainer = SimpleNamespace(_tokenizer=tokenizer)
    return DPOTrainer._prepare_dataset(trainer, dataset, tokenizer, options, name)


def token_ids(tokenizer: PreTrainedTokenizerBase, text: Any, **options: Any) -> list[int]:
    """Token ids of a text, or of a conversation under the chat template, as TRL makes them."""
    return _tokenize(tokenizer, text, **options)["input_ids"]


def shared_length(ids: list[int], other_ids: list[int]) -> int:
    """How many tokens two lists have in common from their beginning on."""
    return common_prefix_length(ids, other_ids)


class FrozenModels:
    """Models beside the policy that are scored and never trained, as TRL keeps its reference; mixed into a trainer."""

    accelerator: Any
    args: Any
    model: Any
    scorer: Any
    is_deepspeed_enabled: bool
    is_fsdp_enabled: bool
    policy_logps: Any
    _precompute_engine: Any = None

    def frozen_logps(self, model: nn.Module, groups: PromptGroups, adapter: str | None = None) -> Tensor:
        """Log-probs (N,) without gradients; `adapter` names the one to use, None switches adapters off."""
        with torch.no_grad(), self.as_adapter(model, adapter), self.accelerator.autocast():
            return self.policy_logps(model, groups)

    @property
    def reference_adapter(self) -> str | None:
        """The adapter that TRL keeps as the reference of one that goes on being trained; None: adapters off."""
        adapters = self.model.peft_config if isinstance(self.model, PeftModel) else {}
        return "ref" if "ref" in adapters else None

    def freeze_adapter(self, name: str) -> None:
        """Keep a frozen copy of the adapter that is trained, under `name`, as TRL keeps one for its reference."""
        self.model.add_adapter(name, self.model.peft_config["default"])
        for parameter_name, parameter in self.model.named_parameters():
            if f".{name}." in parameter_name:
                source = self.model.get_parameter(parameter_name.replace(f".{name}.", ".default."))
                parameter.data.copy_(source.data)
                parameter.requires_grad_(False)

    def start_for_scoring(self) -> nn.Module:
        """The model that training starts from, able to score before it is wrapped; sharded, it needs an engine."""
        if not self.is_deepspeed_enabled:
            return self.model
        if self._precompute_engine is None:
            self._precompute_engine = prepare_deepspeed(self.model, self.accelerator)
        return self._precompute_engine

    def load_start(self) -> nn.Module:
        """A frozen copy of the model that training starts from, loaded as the policy was."""
        options = {"trust_remote_code": self.args.trust_remote_code, **(self.args.model_init_kwargs or {})}
        options |= {"dtype": self.model.dtype, "attn_implementation": self.model.config._attn_implementation}
        if self.args.distributed_state.distributed_type in ("MULTI_GPU", "DEEPSPEED"):
            options["device_map"] = None
        return self.freeze(create_model_from_path(self.model.config._name_or_path, **options))

    def freeze(self, model: PreTrainedModel) -> nn.Module:
        """Place another frozen model beside the policy, as TRL places its reference."""
        disable_dropout_in_model(model)
        self.scorer.attach(model)
        model.requires_grad_(False)
        if self.is_deepspeed_enabled:
            return prepare_deepspeed(model, self.accelerator)
        if self.is_fsdp_enabled:
            return prepare_fsdp(model, self.accelerator)
        return self.accelerator.prepare_model(model, evaluation_mode=True)

    @contextlib.contextmanager
    def as_adapter(self, model: nn.Module, adapter: str | None) -> Iterator[None]:
        """Let a model with adapters use another one, or none; nothing else changes, and no other model at all."""
        unwrapped = self.accelerator.unwrap_model(model)
        with use_adapter(unwrapped, adapter) if isinstance(unwrapped, PeftModel) else contextlib.nullcontext():
            yield


class PairBase(SafeRunMixin, FrozenModels, TextScores, References, MicroBatchMixin, PairTrainerMixin, DPOTrainer):
    """TRL's DPOTrainer with its loss replaced by a pure function of scores.

    Data preparation, reference handling, PEFT, saving and the model card stay TRL's. Raises UserError for
    vision-language models and for the auxiliary loss of mixtures of experts, which it would leave out in silence.
    """

    train_dataset: Any
    eval_dataset: Any
    _signature_columns: Any
    _precompute_engine: Any
    #: what tokenizes this trainer's rows, and what makes a batch of them
    prepare: Callable[..., AnyDataset]
    collator: type = PairCollator
    #: columns beyond TRL's that reach the collator
    batch_columns = [
        "row_id", "last_chosen_logps", "last_rejected_logps", "flipped", "completion_ids", "rewards", "base_ids",
        "ref_logps",
    ]  # fmt: skip

    def __init__(self, model: Any, ref_model: Any = None, args: Any = None, **kwargs: Any) -> None:
        if args is None:
            raise UserError(f"{type(self).__name__} needs its config as `args`")
        if kwargs.pop("compute_metrics", None) is not None:
            raise UserError("compute_metrics would need full logits, which are never built; use the logged metrics")
        tokenizer = kwargs["processing_class"] = text_tokenizer(kwargs.get("processing_class"), model)
        if kwargs.get("data_collator") is None:
            kwargs["data_collator"] = self.collator(max_length=args.max_length)
        refuse_adapter_dropout(kwargs.get("peft_config"))
        best_of_first_set(args, kwargs.get("eval_dataset"))
        if ref_model is None and args.ref_model_name_or_path is not None:
            ref_model = load_frozen(args.ref_model_name_or_path, args)
        self.explicit_reference = ref_model is not None
        self.start_may_differ = "another reference was given" if self.explicit_reference else None
        if brings_references(kwargs["train_dataset"], kwargs.get("eval_dataset"), self.reference_columns):
            if self.explicit_reference:
                raise UserError(
                    f"the reference is given twice: by {self.reference_columns[0]} columns and by a model; drop one"
                )
            self.start_may_differ = "the reference's log-probs come from columns"
        if ref_model is None and isinstance(model, PreTrainedModel) and not model.config._name_or_path:
            if kwargs.get("peft_config") is None:
                ref_model = copy.deepcopy(model)  # built in memory: there is no path to load the reference from
        wanted, args.precompute_ref_log_probs = args.precompute_ref_log_probs, True  # so that TRL loads no reference
        try:
            super().__init__(model=model, ref_model=ref_model, args=args, **kwargs)
        finally:
            args.precompute_ref_log_probs = wanted  # the caller's own
        refuse_vision(self.model.config)
        if self.aux_loss_enabled:
            raise UserError(
                "the auxiliary loss of mixtures of experts is not part of these losses; set router_aux_loss_coef: 0"
            )
        self.start_scoring(self.model, tokenizer.pad_token_id)
        if self.ref_model is not None:
            self.scorer.attach(self.accelerator.unwrap_model(self.ref_model))
        self.add_references(wanted)
        self.add_callback(AlarmCallback.from_args(args, self.eval_dataset))
        logger.info("%s: %s.", type(self).__name__, args.choices)

    def _prepare_dataset(self, dataset: Any, processing_class: Any, args: Any, dataset_name: str) -> Any:
        return type(self).prepare(
            dataset, self._tokenizer, max_length=args.max_length, num_proc=args.dataset_num_proc, name=dataset_name
        )

    def _precompute_ref_logps(self, dataset: Any, name: str, batch_size: int) -> Any:
        """TRL asks while it is built, before anything can be scored, and for a set given to `evaluate`."""
        return self.with_references(dataset, name) if self._ready else dataset

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        self._signature_columns = list(dict.fromkeys([*self._signature_columns, *self.batch_columns]))

    def scores(self, model: nn.Module, inputs: dict[str, Any]) -> PairScores:
        """Policy and reference log-probs of a batch of pairs, (B,) each."""
        groups: PromptGroups = inputs["groups"]
        policy = self.policy_logps(model, groups).reshape(len(groups), -1)
        reference = self.reference_logps(inputs).reshape(len(groups), -1)
        lengths = torch.tensor(groups.lengths(), device=policy.device).reshape(len(groups), -1)
        return PairScores(
            chosen=policy[:, 0],
            rejected=policy[:, 1],
            ref_chosen=reference[:, 0],
            ref_rejected=reference[:, 1],
            base=policy[:, 2] if policy.shape[1] > 2 else None,
            chosen_lengths=lengths[:, 0],
            rejected_lengths=lengths[:, 1],
        )

    def compute_ref_log_probs(self, model: nn.Module, inputs: dict[str, Any]) -> tuple[Tensor, ...]:
        """Reference log-probs of the chosen and of the rejected responses of a batch, (B,) each."""
        logps = self.frozen_logps(model, inputs["groups"].first(2), self.reference_adapter)
        return tuple(logps.reshape(-1, 2).unbind(dim=1))


class SampledBase(SafeRunMixin, FrozenModels, NamedEvaluations, RolloutMixin, RLOOTrainer):
    """TRL's RLOOTrainer, whose sampling (vLLM included), rewards and logs stay, with its loss replaced.

    Of TRL's own methods it replaces one, the per-token scores, which read each prompt once for its completions. Others
    it calls: `_calculate_rewards` keeps the raw rewards, what `_generate_and_score_completions` returns is put in
    groups, so that the shuffle after it moves whole ones, and generation may go in parts. A checkpoint in the middle of
    a rollout holds the rollout. `ref_model` is another frozen model than the one that training starts from. Not
    covered: images, tools.
    """

    _name = "Sampled"
    _tag_names = ["llmalign"]
    _scored: Tensor
    _raw_rewards: Tensor
    _said_no_reward = False

    def __init__(self, model: Any, reward_funcs: Any, args: Any, *, ref_model: Any = None, **kwargs: Any) -> None:
        tokenizer = kwargs["processing_class"] = text_tokenizer(kwargs.get("processing_class"), model)
        refuse_adapter_dropout(kwargs.get("peft_config"))
        refuse_short_data(args, kwargs.get("train_dataset"))
        given = reward_funcs if isinstance(reward_funcs, list) else [reward_funcs]
        reward_funcs = [one if isinstance(one, (str, nn.Module)) else guard(one) for one in given]
        best_of_first_set(args, kwargs.get("eval_dataset"))
        if ref_model is None and args.ref_model_name_or_path is not None:
            ref_model = load_frozen(args.ref_model_name_or_path, args)
        self.start_may_differ = "another reference was given" if ref_model is not None else None
        if ref_model is None and isinstance(model, PreTrainedModel) and not model.config._name_or_path:
            if kwargs.get("peft_config") is None:
                ref_model = copy.deepcopy(model)  # built in memory: there is no path to load the reference from
        wanted, args.beta = args.beta, 0.0  # so that TRL loads no reference and mixes no divergence into the rewards
        try:
            super().__init__(model=model, reward_funcs=reward_funcs, args=args, **kwargs)
        finally:
            args.beta = wanted  # the caller's own, who may mend what was refused and use it again
        refuse_vision(self.model.config)
        if self.aux_loss_enabled:
            raise UserError(
                "the auxiliary loss of mixtures of experts is not part of these losses; set router_aux_loss_coef: 0"
            )
        check_sampling(self.model, args)
        self.start_scoring(self.model, tokenizer.pad_token_id, args.temperature)
        if ref_model is not None:
            self.ref_model = self.freeze(ref_model)
        elif self.needs_reference and not isinstance(self.model, PeftModel):
            self.ref_model = self.load_start()
        logger.info("%s: %s.", type(self).__name__, args.choices)

    def _get_per_token_logps_and_entropies(
        self, model: Any, input_ids: Tensor, attention_mask: Tensor, logits_to_keep: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, None, None]:
        """Log-probs (N, T) of the completions under the sampler; TRL asks for them once, when it has sampled."""
        start = input_ids.shape[1] - logits_to_keep
        size = self.group_size
        ids = {
            "prompt_ids": input_ids[::size, :start],
            "prompt_mask": attention_mask[::size, :start],
            "completion_ids": input_ids[:, start:].unflatten(0, (-1, size)),
            "completion_mask": attention_mask[:, start:].unflatten(0, (-1, size)),
        }
        if self.needs_proposal:
            self._scored = self.sampler_token_logps(model, ids)
        else:
            self._scored = torch.zeros(ids["completion_ids"].shape, device=input_ids.device)
        return self._scored.flatten(0, 1), None, None

    def _generate_single_turn(self, prompt_ids: list[list[int]], *args: Any) -> list[list[int]]:
        at_a_time = self.args.sampling_batch_size
        if at_a_time is None or self.use_vllm:
            return super()._generate_single_turn(prompt_ids, *args)
        completions = []
        for start in range(0, len(prompt_ids), at_a_time):
            completions += super()._generate_single_turn(prompt_ids[start : start + at_a_time], *args)
        return completions

    def _calculate_rewards(self, inputs: Any, prompts: Any, completions: Any, completion_ids_list: Any) -> Tensor:
        with contextlib.ExitStack() as stack:
            for one in self.reward_funcs:
                if isinstance(one, Guarded):
                    stack.enter_context(one.holding_back())
            self._raw_rewards = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        self.refuse_failing_rewards(len(prompts))
        if bool(self._raw_rewards.isnan().all()) and not self._said_no_reward:
            self._said_no_reward = True
            logger.warning("No completion of this rollout has a reward, so nothing is learnt from it; said once.")
        return self._raw_rewards

    def _generate_and_score_completions(self, inputs: Any) -> Rollout:
        batch = super()._generate_and_score_completions(inputs)
        size = self.group_size
        rollout = {key: batch[key][::size] for key in ("row_id", "prompt_ids", "prompt_mask")}
        rollout |= {key: batch[key].unflatten(0, (-1, size)) for key in ("completion_ids", "completion_mask")}
        rollout["token_old"] = self._scored
        rollout["rewards"], usable = self._own_rewards(len(inputs), size)
        rollout["mask"] = usable & rollout["completion_mask"].bool().any(dim=2)  # where truncated ones are masked
        if not self.needs_reference:
            rollout["token_reference"] = torch.zeros_like(self._scored)
        elif self.ref_model is not None:
            rollout["token_reference"] = self.frozen_token_logps(self.ref_model, rollout)
        else:
            with self.as_adapter(self.model, self.reference_adapter):
                rollout["token_reference"] = self.frozen_token_logps(self.model, rollout)
        rollout = self.finish(rollout)
        rollout["weights"] = self.keep(rollout["mask"])
        return rollout | self.judge(rollout, self._scores(rollout, rollout["token_old"]))

    def _own_rewards(self, rows: int, size: int) -> tuple[Tensor, Tensor]:
        """Raw rewards (P, K) of this rank's rows, weighted over the functions, and which rows have one."""
        start = self.accelerator.process_index * rows
        own = self._raw_rewards[start : start + rows]
        total = (own * self.reward_weights.to(own.device)).nansum(dim=1)
        usable = ~torch.isnan(own).all(dim=1)
        for function in self.reward_funcs:
            if isinstance(function, Guarded):
                usable[[failure.row for failure in function.failed]] = False
        return total.unflatten(0, (-1, size)), usable.unflatten(0, (-1, size))

    @property
    def group_size(self) -> int:
        """Completions of a prompt, K."""
        return self.num_generations if self.model.training else self.num_generations_eval

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        save_state(
            self._state_file(output_dir), {"step": self._step, "buffer": self._buffered_inputs} | self.own_state()
        )

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            state = load_state(self._state_file(checkpoint))
            self._step = state.pop("step")
            self._buffered_inputs = send_to_device(state.pop("buffer"), self.accelerator.device)
            self.load_own_state(state)

    def _state_file(self, folder: str) -> Path:
        return Path(folder) / f"rollout_{self.args.process_index}.pt"


def load_frozen(path: str, args: Any, quantization_config: Any = None) -> PreTrainedModel:
    """Load a model as the policy is loaded (`args.model_init_kwargs`, without its revision), to be used as it is.

    The folder of an adapter gives its base model with the adapter merged in. Raises UserError where nothing can be
    loaded from `path`.
    """
    options = {"trust_remote_code": args.trust_remote_code, **weight_options(), **(args.model_init_kwargs or {})}
    options.pop("revision", None)
    if args.distributed_state.distributed_type in ("MULTI_GPU", "DEEPSPEED"):
        options["device_map"] = None  # as TRL loads its own: a model spread over devices cannot be replicated
    if quantization_config is not None:
        options["quantization_config"] = quantization_config
    refuse_pickles(path)
    try:
        if (Path(path) / "adapter_config.json").is_file():
            base = PeftConfig.from_pretrained(path).base_model_name_or_path
            return PeftModel.from_pretrained(create_model_from_path(base, **options), path).merge_and_unload()
        return create_model_from_path(path, **options)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"no model could be loaded from {path!r} ({reason}); check the path or name") from error


def continue_adapter(model: Any, adapter: str, args: Any, quantization_config: Any) -> PeftModel:
    """The model with a saved adapter that goes on being trained. Raises UserError where there is none."""
    base = load_frozen(model, args, quantization_config) if isinstance(model, str) else model
    require_safe_adapter(adapter)
    try:
        return PeftModel.from_pretrained(base, adapter, is_trainable=True)
    except (OSError, ValueError) as error:
        raise UserError(f"no adapter could be loaded from {adapter!r}; check last_adapter") from error
