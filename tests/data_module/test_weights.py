"""A model's digest: blind to adapters that are off, to names and to tools; changed by whatever changes a score."""

from contextlib import contextmanager

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from llmalign.data.weights import weights_digest
from llmalign.errors import UserError
from tests.trainers import tiny

LORA = {
    "lora": LoraConfig(r=4, target_modules=["q_proj", "v_proj"], lora_dropout=0.0),
    "saved": LoraConfig(r=4, target_modules=["q_proj", "embed_tokens"], modules_to_save=["lm_head", "norm"]),
    "tokens": LoraConfig(r=4, target_modules=["q_proj"], trainable_token_indices=[3, 5]),
    "dora": LoraConfig(r=4, target_modules="all-linear", use_dora=True),
}


def changed_adapters(model: nn.Module) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)


@pytest.mark.parametrize("name, tied", [*((name, False) for name in LORA), ("lora", True), ("tokens", True)])
def test_an_adapter_that_is_off_does_not_count(name: str, tied: bool) -> None:
    plain = weights_digest(tiny.model(tie_word_embeddings=tied))
    wrapped = get_peft_model(tiny.model(tie_word_embeddings=tied), LORA[name])
    assert weights_digest(wrapped) == plain
    changed_adapters(wrapped)
    assert weights_digest(wrapped) == plain
    assert weights_digest(wrapped.get_base_model()) == plain


@pytest.mark.parametrize("name", LORA)
def test_an_adapter_that_is_on_counts(name: str) -> None:
    model = get_peft_model(tiny.model(), LORA[name])
    plain, fresh = weights_digest(model), weights_digest(model, "default")
    assert fresh != plain
    changed_adapters(model)
    assert weights_digest(model, "default") not in (fresh, plain)


def test_a_copy_of_an_adapter_has_its_digest_until_one_of_them_is_trained() -> None:
    model = get_peft_model(tiny.model(), LORA["lora"])
    model.add_adapter("ref", LORA["lora"])
    weights = dict(model.named_parameters())
    for name in weights:
        if ".ref." in name:
            weights[name].data.copy_(weights[name.replace(".ref.", ".default.")].data)
    assert weights_digest(model, "ref") == weights_digest(model, "default")
    changed_adapters(model)
    assert weights_digest(model, "ref") != weights_digest(model, "default")


def test_the_strength_of_an_adapter_counts() -> None:
    digests = set()
    for alpha in (8, 16):
        torch.manual_seed(0)
        model = get_peft_model(tiny.model(), LoraConfig(r=4, target_modules=["q_proj"], lora_alpha=alpha))
        digests.add(weights_digest(model, "default"))
    assert len(digests) == 2


def test_saving_loading_and_special_tokens_leave_it_as_it_is(tmp_path) -> None:
    model = tiny.model()
    before = weights_digest(model)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, attn_implementation="eager")
    loaded.config.use_cache, loaded.config.pad_token_id = False, 7
    assert weights_digest(loaded) == before


@pytest.mark.parametrize("change", ["one bit", "dtype", "rope", "norm", "swapped"])
def test_what_changes_scores_changes_it(change: str) -> None:
    model = tiny.model()
    before = weights_digest(model)
    layers = model.model.layers
    if change == "one bit":
        weight = layers[1].mlp.up_proj.weight.data
        weight.view(torch.int32)[0, 0] ^= 1
    elif change == "dtype":
        model.to(torch.bfloat16)
    elif change == "rope":
        model.config.rope_parameters["rope_theta"] = 5e5
    elif change == "norm":
        model.config.rms_norm_eps = 1e-3
    else:
        layers[0].mlp.up_proj, layers[1].mlp.up_proj = layers[1].mlp.up_proj, layers[0].mlp.up_proj
    assert weights_digest(model) != before


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_every_dtype_can_be_read(dtype: torch.dtype) -> None:
    assert weights_digest(tiny.model().to(dtype)) == weights_digest(tiny.model().to(dtype))


def test_sharded_weights_are_gathered_one_at_a_time() -> None:
    whole = weights_digest(tiny.model())
    model = tiny.model()
    held = {id(parameter): parameter.data for parameter in model.parameters()}
    open_now = []

    @contextmanager
    def gather(parameter: nn.Parameter):
        assert not open_now
        open_now.append(parameter)
        parameter.data = held[id(parameter)]
        yield
        parameter.data = torch.empty(0)
        open_now.clear()

    for parameter in model.parameters():
        parameter.data = torch.empty(0)
    with pytest.raises(ValueError, match="sharded"):
        weights_digest(model)
    assert weights_digest(model, gather=gather) == whole


def test_offloaded_weights_are_refused() -> None:
    with pytest.raises(UserError, match="offloaded"):
        weights_digest(tiny.model().to("meta"))
