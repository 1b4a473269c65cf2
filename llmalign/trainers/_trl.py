"""The only file that touches names of TRL outside its public surface; tests/contract holds what it relies on."""

import contextlib
import copy
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeAlias

import torch
from datasets import Dataset, IterableDataset
from datasets.fingerprint import Hasher
from peft import LoraConfig, PeftConfig, PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl import DPOTrainer, ModelConfig
from trl.data_utils import _tokenize, common_prefix_length
from trl.models import prepare_deepspeed, prepare_fsdp
from trl.trainer.utils import add_fused_lm_head, create_model_from_path, disable_dropout_in_model, use_adapter

from llmalign.data.collators import PairCollator
from llmalign.errors import UserError
from llmalign.scores.text import completion_logps
from llmalign.trainers.alarms import AlarmCallback
from llmalign.trainers.checkpoint import SafeCheckpointMixin
from llmalign.trainers.loading import load_tokenizer, refuse_vision, require_chat_template
from llmalign.trainers.pair import PairTrainerMixin
from llmalign.types import PairScores

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


class TextScores:
    """Sequence log-probs of padded text through TRL's fused head; shared by pairs and groups. Mixed into DPOTrainer."""

    def policy_logps(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        """Log-probs (N,) of the completions of `input_ids`, `attention_mask`, `completion_mask` (N, T)."""
        labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
        output = model(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            labels=labels,
            fused_lm_head=True,
            use_cache=False,
        )
        return completion_logps(output.log_probs)

    def compute_ref_log_probs(self, model: nn.Module, inputs: dict[str, Any]) -> tuple[Tensor, ...]:
        """TRL's reference log-probs, fed only with what a model takes: the batch also holds rewards and row ids."""
        return super().compute_ref_log_probs(model, text_batch(inputs))  # type: ignore[misc]

    def frozen_logps(self, model: nn.Module, batch: dict[str, Tensor], adapter: str | None = None) -> Tensor:
        """Log-probs (N,) without gradients; `adapter` names the one to use, None switches adapters off."""
        context = contextlib.nullcontext()
        if isinstance(self.accelerator.unwrap_model(model), PeftModel):  # type: ignore[attr-defined]
            context = use_adapter(self.accelerator.unwrap_model(model), adapter)  # type: ignore[attr-defined]
        with torch.no_grad(), context, self.accelerator.autocast():  # type: ignore[attr-defined]
            return self.policy_logps(model, batch)

    def reference_logps(self, inputs: dict[str, Any]) -> Tensor:
        """Reference log-probs (N,): the frozen model, or the policy with its adapter off."""
        model = self.ref_model if self.ref_model is not None else self.model  # type: ignore[attr-defined]
        return torch.cat(self.compute_ref_log_probs(model, inputs))

    def split_gap(self, model: nn.Module, inputs: dict[str, Any]) -> float:
        """See PairTrainerMixin: the same sequences scored together and one by one."""
        batch = text_batch(inputs)
        with torch.no_grad(), self.accelerator.autocast():  # type: ignore[attr-defined]
            whole = self.policy_logps(model, batch)
            rows = range(len(batch["input_ids"]))
            single = torch.cat([self.policy_logps(model, {k: v[i : i + 1] for k, v in batch.items()}) for i in rows])
        return float((whole - single).abs().max())


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


def text_batch(inputs: dict[str, Any], prefix: str = "") -> dict[str, Tensor]:
    """The three tensors that a language model scores, from a batch; `prefix` picks another set (`base_`)."""
    return {key: inputs[prefix + key] for key in ("input_ids", "attention_mask", "completion_mask")}


class PairBase(SafeCheckpointMixin, TextScores, PairTrainerMixin, DPOTrainer):
    """TRL's DPOTrainer with its loss replaced by a pure function of scores.

    Data preparation, reference handling, PEFT, saving and the model card stay TRL's. Raises UserError for
    vision-language models and for the auxiliary loss of mixtures of experts, which it would leave out in silence.
    """

    train_dataset: Any
    eval_dataset: Any
    _signature_columns: Any
    #: what makes a batch of this trainer's rows
    collator: type = PairCollator
    #: columns beyond TRL's that reach the collator
    batch_columns = ["row_id", "last_chosen_logps", "last_rejected_logps", "flipped", "completion_ids", "rewards"]

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
            kwargs["data_collator"] = self.collator(
                pad_token_id=tokenizer.pad_token_id,
                max_length=args.max_length,
                pad_to_multiple_of=args.pad_to_multiple_of,
            )
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
            args.precompute_ref_log_probs = True  # so that TRL loads no reference model
        if ref_model is None and isinstance(model, PreTrainedModel) and not model.config._name_or_path:
            if kwargs.get("peft_config") is None:
                ref_model = copy.deepcopy(model)  # built in memory: there is no path to load the reference from
        super().__init__(model=model, ref_model=ref_model, args=args, **kwargs)
        refuse_vision(self.model.config)
        if self.aux_loss_enabled:
            raise UserError(
                "the auxiliary loss of mixtures of experts is not part of these losses; set router_aux_loss_coef: 0"
            )
        base = self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model
        add_fused_lm_head(base)  # log-probs alone: TRL's entropy and logit statistics cost time at every call
        self.add_callback(AlarmCallback.from_args(args, self.train_dataset, self.eval_dataset))
        logger.info("%s: %s.", type(self).__name__, args.choices)

    def _prepare_dataset(self, dataset: Any, processing_class: Any, args: Any, dataset_name: str) -> Any:
        return prepare_pairs(
            dataset, self._tokenizer, max_length=args.max_length, num_proc=args.dataset_num_proc, name=dataset_name
        )

    def _precompute_ref_logps(self, dataset: Any, name: str, batch_size: int) -> Any:
        if _has_columns(dataset, "ref_chosen_logps", "ref_rejected_logps"):
            return dataset
        # TRL's key knows the rows and the weights, but not what else the log-probs depend on.
        keyed = copy.copy(dataset)
        keyed._fingerprint = Hasher.hash(
            (dataset._fingerprint, self.args.max_length, self.args.bf16, self.args.fp16, str(self.model.dtype))
        )
        return super()._precompute_ref_logps(keyed, name, batch_size)

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        self._signature_columns = list(dict.fromkeys([*self._signature_columns, *self.batch_columns]))

    def scores(self, model: nn.Module, inputs: dict[str, Any]) -> PairScores:
        """Policy and reference log-probs of a batch of pairs, (B,) each."""
        chosen, rejected = self.policy_logps(model, text_batch(inputs)).chunk(2)
        if "ref_chosen_logps" in inputs:
            ref_chosen, ref_rejected = inputs["ref_chosen_logps"].float(), inputs["ref_rejected_logps"].float()
        else:
            ref_chosen, ref_rejected = self.reference_logps(inputs).chunk(2)
        lengths = inputs["completion_mask"][:, 1:].sum(dim=1)
        chosen_lengths, rejected_lengths = lengths.chunk(2)
        return PairScores(
            chosen=chosen,
            rejected=rejected,
            ref_chosen=ref_chosen,
            ref_rejected=ref_rejected,
            chosen_lengths=chosen_lengths,
            rejected_lengths=rejected_lengths,
        )

    def freeze_adapter(self, name: str) -> None:
        """Keep a frozen copy of the adapter that is trained, under `name`, as TRL keeps one for its reference."""
        self.model.add_adapter(name, self.model.peft_config["default"])
        for parameter_name, parameter in self.model.named_parameters():
            if f".{name}." in parameter_name:
                source = self.model.get_parameter(parameter_name.replace(f".{name}.", ".default."))
                parameter.data.copy_(source.data)
                parameter.requires_grad_(False)

    def freeze(self, model: PreTrainedModel) -> nn.Module:
        """Place another frozen model beside the policy, as TRL places its reference."""
        disable_dropout_in_model(model)
        add_fused_lm_head(model)
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
