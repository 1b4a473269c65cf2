"""Models and tokenizers from a path or a Hub name, with errors that a person can act on."""

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

from peft import PeftConfig, PeftModel
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase
from transformers.utils import is_bitsandbytes_available, is_flash_attn_2_available
from trl import ModelConfig, get_peft_config, get_quantization_config

from llmalign.errors import UserError
from llmalign.pickles import refuse_pickles, require_safe_adapter, weight_options
from llmalign.rewards.classifiers import require_folder

logger = logging.getLogger(__name__)

__all__ = [
    "ModelConfig", "check_model_options", "choose_dtype", "load_tokenizer", "model_arguments", "refuse_vision",
    "require_chat_template", "set_eos_token", "text_tokenizer",
]  # fmt: skip

_ADAPTER_FILE = "adapter_config.json"


def text_tokenizer(given: Any, model: Any) -> PreTrainedTokenizerBase:
    """The tokenizer that was given, else that of the model, which may be a path. Raises UserError for a processor."""
    tokenizer = given
    if tokenizer is None:
        tokenizer = load_tokenizer(model if isinstance(model, str) else model.config._name_or_path)
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise UserError("vision-language models are not supported: pass a text model and its tokenizer")
    return tokenizer


def load_tokenizer(path: str, *, revision: str | None = None, trust_remote_code: bool = False) -> Any:
    """Load a tokenizer and make sure that it can end and pad a text; an adapter folder may borrow its base's.

    Raises UserError where there is none, or where it has neither a pad token nor an EOS token.
    """
    if not path:
        raise UserError("the model was built in memory, so there is no tokenizer to load: pass processing_class")
    require_folder(path, "check model_name_or_path")
    options = {"revision": revision, "trust_remote_code": trust_remote_code}
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, **options)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(
            f"no tokenizer could be loaded from {path!r} ({_first_line(error)}); "
            "save one beside the model with tokenizer.save_pretrained, or check the name"
        ) from error
    if tokenizer.eos_token is None:
        lacking = "neither a pad token nor an EOS token" if tokenizer.pad_token is None else "no EOS token"
        raise UserError(
            f"the tokenizer of {path!r} has {lacking}, so completions cannot end; set eos_token in its "
            "tokenizer_config.json"
        )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
        logger.info("The tokenizer has no pad token; its EOS token %r pads, masked by length.", tokenizer.eos_token)
    return tokenizer


def set_eos_token(tokenizer: PreTrainedTokenizerBase, token: str | None) -> None:
    """End texts with this token, where one is named. Raises UserError where the tokenizer does not have it."""
    if token is None:
        return
    if token not in tokenizer.get_vocab():
        raise UserError(f"eos_token {token!r} is no token of the tokenizer: name one of its vocabulary")
    tokenizer.eos_token = token


def require_chat_template(tokenizer: PreTrainedTokenizerBase, row: dict[str, Any]) -> None:
    """Raise UserError where a row is a conversation and the tokenizer has no chat template to write it with."""
    conversational = any(isinstance(row.get(key), list) for key in ("prompt", "chosen", "messages", "completion"))
    if conversational and tokenizer.chat_template is None:
        raise UserError(
            "the data are conversations, but the tokenizer has no chat template; use an instruction-tuned model's "
            "tokenizer, set tokenizer.chat_template, or give plain text in prompt, chosen and rejected"
        )


def check_model_options(options: ModelConfig) -> None:
    """Raise UserError where the recipe asks for a library that is not installed, with the line that installs it."""
    if options.attn_implementation == "flash_attention_2" and not is_flash_attn_2_available():
        raise UserError(
            "attn_implementation: flash_attention_2 needs the flash-attn package: pip install 'llmalign[flash]'; "
            "if it does not build, use kernels-community/flash-attn2 (pip install 'llmalign[flash-hub]') or sdpa"
        )
    if (options.load_in_4bit or options.load_in_8bit) and not is_bitsandbytes_available():
        raise UserError("4- and 8-bit loading needs bitsandbytes: pip install 'llmalign[quant]'")


def refuse_vision(config: PretrainedConfig) -> None:
    """Raise UserError for a vision-language model: these losses score text alone."""
    if config.get_text_config() is not config:
        raise UserError(f"vision-language models ({config.model_type}) are not supported: name a text model")


def choose_dtype(options: ModelConfig, *, chosen: bool, bf16: bool) -> ModelConfig:
    """Hold frozen base weights (LoRA, 4 and 8 bit) in bfloat16 where training runs in it and the recipe is silent.

    Weights that are trained themselves stay in float32, with bfloat16 as the precision of the computation.
    """
    frozen = options.use_peft or options.load_in_4bit or options.load_in_8bit
    if chosen or not bf16 or not frozen:
        return options
    logger.info("The frozen base weights are held in bfloat16; set dtype to change that.")
    return replace(options, dtype="bfloat16")


def model_arguments(
    options: ModelConfig, *, trust_remote_code: bool = False, scorer: bool = False
) -> tuple[Any, dict[str, Any], dict]:
    """Turn TRL's ModelConfig into what a trainer takes: the model (a name, or a loaded adapter), the trainer's keyword
    arguments (`peft_config`, `quantization_config`) and `model_init_kwargs` for its config.

    `scorer` says that a reward model is trained: its adapter is for classification and its new head is trained whole.
    Raises UserError where the model's path does not exist or holds no text model.
    """
    check_model_options(options)
    if scorer:
        options = replace(options, lora_task_type="SEQ_CLS", lora_modules_to_save=["score"])
    path = options.model_name_or_path
    if not path:
        raise UserError("the recipe names no model: set model_name_or_path")
    init = {"revision": options.model_revision, "attn_implementation": options.attn_implementation}
    init |= {"dtype": options.dtype, **weight_options()}
    init = {key: value for key, value in init.items() if value is not None}
    quantization = get_quantization_config(options)
    keywords = {"peft_config": get_peft_config(options), "quantization_config": quantization}
    if (Path(path) / _ADAPTER_FILE).is_file():
        if scorer:
            raise UserError(
                f"{path!r} is an adapter; a reward or preference model starts from a whole one: merge it first"
            )
        return _load_adapter(path, init, quantization, trust_remote_code), {}, init
    require_folder(path, "check model_name_or_path")
    try:
        config = AutoConfig.from_pretrained(path, revision=options.model_revision, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        way_out = "check the path or name"
        if "trust_remote_code" in str(error):
            way_out = "read that code, and set trust_remote_code: true if it may run here"
        raise UserError(f"no model could be found at {path!r} ({_first_line(error)}); {way_out}") from error
    refuse_vision(config)
    refuse_pickles(path)
    return path, keywords, init


def _load_adapter(path: str, init: dict[str, Any], quantization: Any, trust_remote_code: bool) -> PeftModel:
    base = PeftConfig.from_pretrained(path).base_model_name_or_path
    require_safe_adapter(path)
    refuse_pickles(str(base))
    logger.info("%s is an adapter: training goes on from it, on its base model %s.", path, base)
    model = AutoModelForCausalLM.from_pretrained(
        base, quantization_config=quantization, trust_remote_code=trust_remote_code, **init
    )
    return PeftModel.from_pretrained(model, path, is_trainable=True)


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0][:200]
