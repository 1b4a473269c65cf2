"""The only file that touches names of TRL outside its public surface; tests/contract holds what it relies on."""

import contextlib
import copy
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeAlias

import torch
from datasets import Dataset, IterableDataset
from peft import LoraConfig, PeftConfig, PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl import DPOTrainer, ModelConfig
from trl.data_utils import _tokenize, common_prefix_length
from trl.models import prepare_deepspeed, prepare_fsdp
from trl.trainer.utils import create_model_from_path, disable_dropout_in_model, use_adapter

from llmalign.data.collators import PairCollator
from llmalign.errors import UserError
from llmalign.trainers.alarms import AlarmCallback
from llmalign.trainers.batching import MicroBatchMixin
from llmalign.trainers.checkpoint import SafeCheckpointMixin
from llmalign.trainers.loading import load_tokenizer, refuse_vision, require_chat_template
from llmalign.trainers.pair import PairTrainerMixin
from llmalign.trainers.references import References
from llmalign.trainers.text_scores import TextScores
from llmalign.types import PairScores, PromptGroups

logger = logging.getLogger(__name__)

AnyDataset: TypeAlias = Dataset | IterableDataset


def _map_options(dataset: AnyDataset, num_proc: int | None, description: str) -> dict[str, Any]:
    """Streams know neither worker processes nor a progress bar."""
    return {"num_proc": num_proc, "desc": description} if isinstance(dataset, Dataset) else {}


def _has_columns(dataset: AnyDataset, *columns: str) -> bool:
    first = next(iter(dataset))
    return all(column in first for column in columns)


def _with_row_ids(dataset: AnyDataset, num_proc: int | None) -> AnyDataset:
    if _has_columns(dataset, "row_id"):
        return dataset
    return dataset.map(
        lambda _, index: {"row_id": index}, with_indices=True, **_map_options(dataset, num_proc, "Numbering rows")
    )


def prepare_pairs(
    dataset: AnyDataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int | None,
    num_proc: int | None = None,
    name: str = "train",
) -> AnyDataset:
    """Prepare preference rows as TRL does: implicit prompt split out, EOS added, tokenized; too long prompts dropped.

    Adds `row_id`, `prompt_ids`, `chosen_ids`, `rejected_ids` (lists of ids, untruncated, EOS included) and, where the
    rows have a `base` column, `base_ids`. Rows already prepared come back as they are. Raises UserError for
    conversational rows without a chat template. Not covered: images.
    """
    if _has_columns(dataset, "row_id", "prompt_ids", "chosen_ids", "rejected_ids"):
        return dataset
    first = next(iter(dataset))
    require_chat_template(tokenizer, first)
    options = SimpleNamespace(dataset_num_proc=num_proc, max_length=max_length, truncation_mode="keep_start")
    prepared = DPOTrainer._prepare_dataset(
        SimpleNamespace(_tokenizer=tokenizer), _with_row_ids(dataset, num_proc), tokenizer, options, name
    )
    if "base" in first:
        prepared = prepared.map(
            lambda row: {"base_ids": _completion_ids(tokenizer, row["prompt"], row["base"], row["prompt_ids"])},
            **_map_options(prepared, num_proc, f"Tokenizing the base column of {name}"),
        )
    return prepared


def prepare_groups(
    dataset: AnyDataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int | None,
    num_proc: int | None = None,
    name: str = "train",
) -> AnyDataset:
    """Prepare rows of scored completions: adds `row_id`, `prompt_ids` and `completion_ids` (k lists, EOS included).

    Rows whose prompt alone fills `max_length` are dropped, as TRL does for pairs. Rows already prepared come back as
    they are. Raises UserError for conversational rows without a chat template.
    """
    if _has_columns(dataset, "row_id", "prompt_ids", "completion_ids"):
        return dataset
    require_chat_template(tokenizer, next(iter(dataset)))

    def tokenize(row: dict[str, Any]) -> dict[str, Any]:
        conversational = isinstance(row["prompt"], list)
        options = {"add_generation_prompt": True} if conversational else {}
        prompt_ids = _tokenize(tokenizer, row["prompt"], **options)["input_ids"]
        full = [_full_ids(tokenizer, row["prompt"], completion) for completion in row["completions"]]
        length = min(common_prefix_length(prompt_ids, ids) for ids in full)
        return {"prompt_ids": prompt_ids[:length], "completion_ids": [ids[length:] for ids in full]}

    numbered = _with_row_ids(dataset, num_proc)
    prepared = numbered.map(tokenize, **_map_options(numbered, num_proc, f"Tokenizing {name}"))
    if max_length is None:
        return prepared
    return prepared.filter(
        lambda row: len(row["prompt_ids"]) < max_length,
        **_map_options(prepared, num_proc, f"Dropping prompts that fill max_length from {name}"),
    )


def _full_ids(tokenizer: PreTrainedTokenizerBase, prompt: Any, completion: Any) -> list[int]:
    if isinstance(prompt, list):
        return _tokenize(tokenizer, prompt + completion)["input_ids"]
    end = "" if completion.endswith(tokenizer.eos_token) else tokenizer.eos_token
    return _tokenize(tokenizer, prompt + completion + end)["input_ids"]


def _completion_ids(
    tokenizer: PreTrainedTokenizerBase, prompt: Any, completion: Any, prompt_ids: list[int]
) -> list[int]:
    full = _full_ids(tokenizer, prompt, completion)
    if full[: len(prompt_ids)] != prompt_ids:
        raise UserError(
            "a base response changes how its prompt is tokenized, so it cannot share the pair's prompt; "
            "end the prompt on a token boundary"
        )
    return full[len(prompt_ids) :]


class NamedEvaluations:
    """Gives TRL's own evaluation metrics the name of their set, which TRL leaves out: sets overwrite each other."""

    _metrics: dict[str, Any]

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> Any:
        """Run the evaluation and rename what TRL's `log` will put `eval_` before."""
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)  # type: ignore[misc]
        name = metric_key_prefix.removeprefix("eval").removeprefix("_")
        if name:
            named = {f"{name}_{key}": values for key, values in self._metrics["eval"].items()}
            self._metrics["eval"].clear()
            self._metrics["eval"].update(named)
        return output


class PairBase(SafeCheckpointMixin, TextScores, References, MicroBatchMixin, PairTrainerMixin, DPOTrainer):
    """TRL's DPOTrainer with its loss replaced by a pure function of scores.

    Data preparation, reference handling, PEFT, saving and the model card stay TRL's. Raises UserError for
    vision-language models and for the auxiliary loss of mixtures of experts, which it would leave out in silence.
    """

    train_dataset: Any
    eval_dataset: Any
    _signature_columns: Any
    _precompute_engine: Any
    #: what makes a batch of this trainer's rows
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
        tokenizer = kwargs.get("processing_class")
        if tokenizer is None:
            tokenizer = load_tokenizer(model if isinstance(model, str) else model.config._name_or_path)
        if not isinstance(tokenizer, PreTrainedTokenizerBase):
            raise UserError("vision-language models are not supported: pass a text model and its tokenizer")
        kwargs["processing_class"] = tokenizer
        if kwargs.get("data_collator") is None:
            kwargs["data_collator"] = self.collator(max_length=args.max_length)
        _no_adapter_dropout(kwargs.get("peft_config"))
        _best_of_first_set(args, kwargs.get("eval_dataset"))
        if ref_model is None and args.ref_model_name_or_path is not None:
            ref_model = load_frozen(args.ref_model_name_or_path, args)
        self.explicit_reference = ref_model is not None
        self.start_may_differ = "another reference was given" if self.explicit_reference else None
        if _reference_columns(kwargs["train_dataset"], kwargs.get("eval_dataset")):
            if self.explicit_reference:
                raise UserError("the reference is given twice: by ref_chosen_logps columns and by a model; drop one")
            self.start_may_differ = "the reference's log-probs come from columns"
        if ref_model is None and isinstance(model, PreTrainedModel) and not model.config._name_or_path:
            if kwargs.get("peft_config") is None:
                ref_model = copy.deepcopy(model)  # built in memory: there is no path to load the reference from
        wanted, args.precompute_ref_log_probs = args.precompute_ref_log_probs, True  # so that TRL loads no reference
        super().__init__(model=model, ref_model=ref_model, args=args, **kwargs)
        args.precompute_ref_log_probs = wanted
        refuse_vision(self.model.config)
        if self.aux_loss_enabled:
            raise UserError(
                "the auxiliary loss of mixtures of experts is not part of these losses; set router_aux_loss_coef: 0"
            )
        self.start_scoring(self.model, tokenizer.pad_token_id)
        if self.ref_model is not None:
            self.scorer.attach(self.accelerator.unwrap_model(self.ref_model))
        self.add_references(wanted)
        self.add_callback(AlarmCallback.from_args(args, self.train_dataset, self.eval_dataset))
        logger.info("%s: %s.", type(self).__name__, args.choices)

    def _prepare_dataset(self, dataset: Any, processing_class: Any, args: Any, dataset_name: str) -> Any:
        return prepare_pairs(
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

    def frozen_logps(self, model: nn.Module, groups: PromptGroups, adapter: str | None = None) -> Tensor:
        """Log-probs (N,) without gradients; `adapter` names the one to use, None switches adapters off."""
        context = contextlib.nullcontext()
        if isinstance(self.accelerator.unwrap_model(model), PeftModel):
            context = use_adapter(self.accelerator.unwrap_model(model), adapter)
        with torch.no_grad(), context, self.accelerator.autocast():
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


def load_frozen(path: str, args: Any, quantization_config: Any = None) -> PreTrainedModel:
    """Load a model as the policy is loaded (`args.model_init_kwargs`, without its revision), to be used as it is.

    The folder of an adapter gives its base model with the adapter merged in. Raises UserError where nothing can be
    loaded from `path`.
    """
    options = {"trust_remote_code": args.trust_remote_code, **(args.model_init_kwargs or {})}
    options.pop("revision", None)
    if args.distributed_state.distributed_type in ("MULTI_GPU", "DEEPSPEED"):
        options["device_map"] = None  # as TRL loads its own: a model spread over devices cannot be replicated
    if quantization_config is not None:
        options["quantization_config"] = quantization_config
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
    try:
        return PeftModel.from_pretrained(base, adapter, is_trainable=True)
    except (OSError, ValueError) as error:
        raise UserError(f"no adapter could be loaded from {adapter!r}; check last_adapter") from error


def _reference_columns(train: AnyDataset, evaluation: Any) -> bool:
    """Whether the rows bring their reference log-probs; all data sets must agree."""
    sets = [train, *(evaluation.values() if isinstance(evaluation, dict) else [evaluation])]
    found = [_has_columns(rows, "ref_chosen_logps", "ref_rejected_logps") for rows in sets if rows is not None]
    if any(found) and not all(found):
        raise UserError("ref_chosen_logps and ref_rejected_logps must be in every data set, or in none")
    return all(found)


def _no_adapter_dropout(peft_config: Any) -> None:
    """All dropout is off while scoring; an explicit dropout of the adapter would be ignored in silence."""
    if not isinstance(peft_config, LoraConfig) or peft_config.lora_dropout == 0:
        return
    if peft_config.lora_dropout != ModelConfig.lora_dropout:
        raise UserError(
            f"lora_dropout={peft_config.lora_dropout} is not honoured: dropout makes policy and reference differ; "
            "set lora_dropout: 0"
        )
    logger.info("TRL's default lora_dropout of %g is switched off.", peft_config.lora_dropout)


def _best_of_first_set(args: Any, eval_dataset: Any) -> None:
    """Metrics of several evaluation sets carry the set's name, so a metric without one means the first."""
    if isinstance(eval_dataset, dict) and args.metric_for_best_model == "rewards/accuracies":
        args.metric_for_best_model = f"eval_{next(iter(eval_dataset))}_rewards/accuracies"
        logger.info("The best checkpoint is picked by %s.", args.metric_for_best_model)
