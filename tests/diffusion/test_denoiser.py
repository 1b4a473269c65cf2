"""Adapters on, off and another's, and their files: what plain diffusers writes and reads."""

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoraConfig, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from llmalign.diffusion.denoiser import LORA_FILE, POLICY, Denoiser
from llmalign.diffusion.pipelines import family_of
from llmalign.errors import UserError

CAPTIONS = ["digit seven", "a small red picture"]
KINDS = ("sd", "sdxl", "sd3", "flux")  # the others differ in nothing that matters here
TIMES = torch.tensor([100.0, 700.0])


def lora(pipe: Any, rank: int = 2, alpha: int = 6) -> LoraConfig:
    """A scale of three, so that a file that forgets alpha shows."""
    return LoraConfig(
        r=rank, lora_alpha=alpha, target_modules=list(family_of(pipe).lora_targets), init_lora_weights="gaussian"
    )


def denoiser_of(pipe: Any) -> Denoiser:
    """Frozen: torch computes with weights that require gradients in another order, even where none are recorded."""
    family = family_of(pipe)
    return Denoiser(pipe.components[family.network_name], family).eval().requires_grad_(False)


def shake(denoiser: Denoiser, seed: int = 0, name: str = POLICY) -> None:
    """Give an adapter other weights, both factors of it."""
    generator = torch.Generator().manual_seed(seed)
    state = denoiser.adapter_state(name)
    denoiser.load_adapter_state({key: torch.randn(v.shape, generator=generator) / 4 for key, v in state.items()}, name)


@cache
def batch(kind: str, pipe: Any) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    noisy = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return noisy, TIMES, family_of(pipe).conditions(pipe, CAPTIONS)


@torch.no_grad()
def predicted(denoiser: Denoiser, given: tuple) -> Tensor:
    return denoiser(*given)


@pytest.fixture
def adapted(tiny_pipeline):
    """A pipeline's denoiser with a trained adapter, a batch, and the base's predictions."""

    def make(kind: str = "sd", alpha: int = 6) -> tuple[Any, Denoiser, tuple, Tensor]:
        pipe = tiny_pipeline(kind)
        given = batch(kind, pipe)
        denoiser = denoiser_of(pipe)
        base = predicted(denoiser, given)
        denoiser.add_adapter(lora(pipe, alpha=alpha))
        assert torch.equal(predicted(denoiser, given), base), "a new adapter starts at zero"
        shake(denoiser)
        return pipe, denoiser, given, base

    return make


def trained(denoiser: Denoiser) -> set[str]:
    """Names of adapters that have a parameter with gradients; "base" for the network's own."""
    own = {name for name, value in denoiser.named_parameters() if value.requires_grad}
    return {next((adapter for adapter in denoiser.adapters if f".{adapter}." in name), "base") for name in own}


# Switching


@pytest.mark.parametrize("kind", KINDS)
def test_with_adapters_off_it_is_the_base_exactly(kind, adapted):
    _, denoiser, given, base = adapted(kind)
    changed = predicted(denoiser, given)
    assert not torch.allclose(changed, base, atol=1e-3)
    with denoiser.using(None):
        assert torch.equal(predicted(denoiser, given), base)
    assert torch.equal(predicted(denoiser, given), changed)


def test_a_named_copy_stays_as_it_was_while_the_policy_moves(adapted):
    _, denoiser, given, base = adapted()
    before = predicted(denoiser, given)
    denoiser.add_copy("ref")
    assert denoiser.adapters == [POLICY, "ref"]
    assert torch.equal(predicted(denoiser, given), before)
    shake(denoiser, seed=1)
    after = predicted(denoiser, given)
    assert not torch.allclose(after, before, atol=1e-3)
    with denoiser.using("ref"):
        assert torch.equal(predicted(denoiser, given), before)
        with denoiser.using(None):
            assert torch.equal(predicted(denoiser, given), base)
            with denoiser.using(POLICY):
                assert torch.equal(predicted(denoiser, given), after)
            assert torch.equal(predicted(denoiser, given), base)
        assert torch.equal(predicted(denoiser, given), before)
    assert torch.equal(predicted(denoiser, given), after)


def test_several_copies_hold_several_states(adapted):
    _, denoiser, given, _ = adapted()
    expected = {}
    for seed in range(3):
        shake(denoiser, seed=seed)
        denoiser.add_copy(f"past-{seed}")
        expected[f"past-{seed}"] = predicted(denoiser, given)
    for name, value in expected.items():
        with denoiser.using(name):
            assert torch.equal(predicted(denoiser, given), value), name


@pytest.mark.parametrize("kind", ["sd", "sd3", "flux"])
def test_gradients_are_the_policys_alone_after_every_switch(kind, adapted):
    _, denoiser, given, _ = adapted(kind)
    assert trained(denoiser) == {POLICY}
    denoiser.add_copy("ref")
    assert trained(denoiser) == {POLICY}
    for name in (None, "ref", None, POLICY):
        with denoiser.using(name), torch.no_grad():
            denoiser(*given)
        assert trained(denoiser) == {POLICY}
    denoiser(*given).square().mean().backward()
    with_gradient = {name for name, value in denoiser.named_parameters() if value.grad is not None}
    assert with_gradient == {name for name, _ in denoiser.named_parameters() if f".{POLICY}." in name}
    without = {name for name, value in denoiser.named_parameters() if "lora_B.default" in name and not value.grad.any()}
    # SD3's last block has no use for what becomes of the caption.
    assert all(name.startswith("network.transformer_blocks.1.attn.add_q_proj") for name in without)
    assert len(without) == (kind == "sd3")


def test_gradients_are_those_of_a_network_that_was_never_switched(adapted):
    _, denoiser, given, _ = adapted()

    def gradients() -> list[Tensor]:
        denoiser.zero_grad()
        prediction = denoiser(*given)
        with denoiser.using(None), torch.no_grad():  # between forward and backward
            denoiser(*given)
        prediction.square().mean().backward()
        return [value.grad for value in denoiser.parameters() if value.grad is not None]

    switched = gradients()
    denoiser.zero_grad()
    denoiser(*given).square().mean().backward()
    plain = [value.grad for value in denoiser.parameters() if value.grad is not None]
    assert len(switched) == len(plain) > 0
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(switched, plain, strict=True))


@pytest.mark.parametrize("name", [None, "ref"])
def test_what_was_in_use_comes_back_after_an_error(name, adapted):
    _, denoiser, given, _ = adapted()
    denoiser.add_copy("ref")
    shake(denoiser, seed=1)
    expected = predicted(denoiser, given)
    with pytest.raises(RuntimeError, match="inside"), denoiser.using(name):
        raise RuntimeError("inside")
    assert torch.equal(predicted(denoiser, given), expected) and trained(denoiser) == {POLICY}


def test_an_adapter_that_is_not_there_is_an_error_and_changes_nothing(adapted):
    _, denoiser, given, _ = adapted()
    expected = predicted(denoiser, given)
    with pytest.raises(ValueError, match="no adapter 'nobody'; there are"), denoiser.using("nobody"):
        pass
    assert torch.equal(predicted(denoiser, given), expected) and trained(denoiser) == {POLICY}


def test_a_network_without_adapters_is_left_as_it_is(tiny_pipeline):
    denoiser = denoiser_of(tiny_pipeline("sd")).requires_grad_(True)
    assert denoiser.adapters == [] and not denoiser.has_adapters
    with denoiser.using(None):
        assert trained(denoiser) == {"base"}
    with pytest.raises(ValueError, match="no adapter 'ref'"), denoiser.using("ref"):
        pass


def test_half_precision_networks_train_adapters_in_float32(tiny_pipeline):
    pipe = tiny_pipeline("sd").to(torch.bfloat16)
    denoiser = denoiser_of(pipe)
    denoiser.add_adapter(lora(pipe))
    denoiser.add_copy("ref")
    kinds = {name: value.dtype for name, value in denoiser.named_parameters()}
    assert all((dtype == torch.float32) == (f".{POLICY}." in name) or ".ref." in name for name, dtype in kinds.items())
    noisy, times, conditions = batch("sd", pipe)
    with torch.autocast("cpu", torch.bfloat16):
        assert predicted(denoiser, (noisy, times, conditions)).dtype == torch.bfloat16


def test_dropout_that_a_file_asks_for_is_off(adapted, tiny_pipeline, tmp_path):
    pipe, denoiser, given, _ = adapted()
    denoiser.network.peft_config[POLICY].lora_dropout = 0.5
    denoiser.save_adapter(type(pipe), tmp_path)
    other = tiny_pipeline("sd")
    again = denoiser_of(other)
    again.load_adapter(other, tmp_path)
    again.add_copy("ref")
    again.train()
    assert again.network.peft_config[POLICY].lora_dropout == 0.5
    expected = predicted(denoiser, given)
    assert torch.equal(predicted(again, given), expected)
    with again.using("ref"):
        assert torch.equal(predicted(again, given), expected)


def test_dropout_is_off(tiny_pipeline):
    pipe = tiny_pipeline("sd")
    pipe.unet.mid_block.resnets[0].dropout.p = 0.5
    denoiser = denoiser_of(pipe).train()
    given = batch("sd", pipe)
    assert torch.equal(predicted(denoiser, given), predicted(denoiser, given))
    assert not [module for module in denoiser.modules() if isinstance(module, nn.Dropout) and module.p > 0]


# Files


@pytest.mark.parametrize("kind", KINDS)
def test_plain_diffusers_loads_the_file_with_the_same_predictions(kind, adapted, tiny_pipeline, tmp_path):
    pipe, denoiser, given, base = adapted(kind)
    denoiser.save_adapter(type(pipe), tmp_path)
    expected = predicted(denoiser.requires_grad_(False), given)
    assert [path.name for path in tmp_path.iterdir()] == [LORA_FILE]
    plain = tiny_pipeline(kind)
    plain.load_lora_weights(tmp_path)
    assert torch.equal(predicted(denoiser_of(plain), given), expected)
    plain.unload_lora_weights()
    assert torch.equal(predicted(denoiser_of(plain), given), base)


@pytest.mark.parametrize("kind", KINDS)
def test_what_was_saved_is_read_back_bit_by_bit(kind, adapted, tiny_pipeline, tmp_path):
    pipe, denoiser, given, _ = adapted(kind)
    denoiser.add_copy("ref")
    saved = {name: value.clone() for name, value in denoiser.adapter_state().items()}
    denoiser.save_adapter(type(pipe), tmp_path)
    shake(denoiser, seed=1)
    copied = {name: value.clone() for name, value in denoiser.adapter_state("ref").items()}
    denoiser.save_adapter(type(pipe), tmp_path / "ref", "ref")
    denoiser.restore_adapter(type(pipe), tmp_path)
    assert {name for name, v in denoiser.adapter_state().items() if torch.equal(v, saved[name])} == saved.keys()
    shake(denoiser, seed=2, name="ref")
    denoiser.restore_adapter(type(pipe), tmp_path / "ref", "ref")
    assert {name for name, v in denoiser.adapter_state("ref").items() if torch.equal(v, copied[name])} == copied.keys()
    assert trained(denoiser) == {POLICY}


@pytest.mark.parametrize("kind", ["sd", "flux"])
def test_training_goes_on_from_a_file(kind, adapted, tiny_pipeline, tmp_path):
    pipe, denoiser, given, _ = adapted(kind)
    denoiser.save_adapter(type(pipe), tmp_path)
    other = tiny_pipeline(kind)
    again = denoiser_of(other)
    again.load_adapter(other, tmp_path)
    assert again.has_adapters and again.adapters == [POLICY] and trained(again) == {POLICY}
    assert torch.equal(predicted(again, given), predicted(denoiser, given))
    config = again.network.peft_config[POLICY]
    assert (config.r, config.lora_alpha) == (2, 6)
    by_file = denoiser_of(tiny_pipeline(kind))
    by_file.load_adapter(pipe_with(by_file, tiny_pipeline(kind)), tmp_path / LORA_FILE)
    assert torch.equal(predicted(by_file, given), predicted(denoiser, given))


def pipe_with(denoiser: Denoiser, pipe: Any) -> Any:
    pipe.register_modules(**{denoiser.family.network_name: denoiser.network})
    return pipe


def test_a_path_without_an_adapter_is_named(tiny_pipeline, tmp_path):
    pipe = tiny_pipeline("sd")
    denoiser = denoiser_of(pipe)
    for path in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(UserError, match=f"no LoRA file could be loaded from {path} .*; check the path"):
            denoiser.load_adapter(pipe, path)
    (tmp_path / LORA_FILE).write_bytes(b"rubbish")
    with pytest.raises(UserError, match="no LoRA file could be loaded from"):
        denoiser.load_adapter(pipe, tmp_path)
    save_file({"weight": torch.zeros(2)}, tmp_path / LORA_FILE)
    with pytest.raises(UserError, match="LoRA file could be loaded from|holds no adapter of the unet"):
        denoiser.load_adapter(pipe, tmp_path)


def test_an_adapter_of_the_text_encoder_is_refused(tiny_pipeline, tmp_path):
    pipe = tiny_pipeline("sd")
    denoiser = denoiser_of(pipe)
    denoiser.add_adapter(lora(pipe))
    pipe.text_encoder.add_adapter(LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    type(pipe).save_lora_weights(
        tmp_path,
        unet_lora_layers=denoiser.adapter_state(),
        text_encoder_lora_layers=convert_state_dict_to_diffusers(get_peft_model_state_dict(pipe.text_encoder)),
    )
    fresh = tiny_pipeline("sd")
    with pytest.raises(UserError, match="holds an adapter of the text_encoder, too; only one of the unet can be"):
        denoiser_of(fresh).load_adapter(fresh, tmp_path)


@pytest.mark.parametrize("fault", ["another rank", "a weight too few", "a weight too many", "another network"])
def test_weights_that_do_not_fit_are_refused(fault, adapted, tiny_pipeline, tmp_path):
    pipe, denoiser, given, _ = adapted()
    denoiser.save_adapter(type(pipe), tmp_path)
    state = load_file(tmp_path / LORA_FILE)
    first = sorted(state)[0]
    if fault == "another rank":
        other = tiny_pipeline("sd")
        denoiser = denoiser_of(other)
        denoiser.add_adapter(lora(other, rank=3))
    elif fault == "a weight too few":
        del state[first]
    elif fault == "a weight too many":
        state["unet.mid_block.nobody.lora_A.weight"] = torch.zeros(2, 16)
    else:
        state = {name.replace("unet.", "transformer."): value for name, value in state.items()}
    save_file(state, tmp_path / LORA_FILE)
    before = {name: value.clone() for name, value in denoiser.adapter_state().items()}
    with pytest.raises(UserError, match="do not fit this network .* resume with the recipe that wrote them"):
        denoiser.restore_adapter(type(pipe), tmp_path)
    assert fault != "another network" or all(torch.equal(v, before[n]) for n, v in denoiser.adapter_state().items())


def test_the_configuration_travels_in_the_file(adapted, tmp_path):
    pipe, denoiser, _, _ = adapted()
    denoiser.save_adapter(type(pipe), tmp_path)
    header = (tmp_path / LORA_FILE).read_bytes()
    length = int.from_bytes(header[:8], "little")
    said = json.loads(json.loads(header[8 : 8 + length])["__metadata__"]["lora_adapter_metadata"])
    assert (said["unet.r"], said["unet.lora_alpha"]) == (2, 6)
    assert Path(tmp_path / LORA_FILE).stat().st_size < 100_000
