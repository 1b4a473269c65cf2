"""Each architecture is called as its ordinary pipeline calls it: what a real call hands to the network is compared."""

from functools import cache
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionImg2ImgPipeline
from torch import Tensor, nn

from llmalign.diffusion.pipelines import FAMILIES, Family, family_of, load_pipeline
from llmalign.diffusion.process import Flow, process_of
from llmalign.diffusion.tiny import KINDS
from llmalign.errors import UserError

CAPTIONS = ["digit seven", "a small red picture"]
GUIDED = ("sd", "sd2", "sdxl", "sd3")
FLUX = ("flux", "flux-schnell")
Call = dict[str, Any]


def recorded_calls(network: nn.Module) -> tuple[list[Call], list[Tensor], Any]:
    """What the network is given from now on, by name, and what it returns; the third part ends it when called."""
    calls, outputs = [], []
    names = ("sample", "timestep")  # that pipelines and families give by position

    def record(module: nn.Module, args: tuple, kwargs: Call, output: Any) -> None:
        given = dict(zip(names, args, strict=False)) | kwargs
        calls.append({name: value for name, value in given.items() if value is not None and value != {}})
        outputs.append(output[0])

    return calls, outputs, network.register_forward_hook(record, with_kwargs=True).remove


@pytest.fixture(scope="module")
def calls(tiny_pipeline):
    """A kind's pipeline, its family, and the calls of its network while it draws CAPTIONS, two steps."""

    @cache
    def made(kind: str, height: int = 8, width: int = 8) -> tuple[Any, Family, list[Call], list[Tensor]]:
        pipe = tiny_pipeline(kind)
        family = family_of(pipe, guidance=2.5)
        calls, outputs, end = recorded_calls(pipe.components[family.network_name])
        options = {"guidance_scale": 2.5, "num_inference_steps": 2, "height": height, "width": width}
        pipe(CAPTIONS, generator=torch.Generator().manual_seed(0), output_type="latent", **options)
        end()
        return pipe, family, calls, outputs

    return made


def unpacked(pipe: Any, latents: Tensor, height: int, width: int) -> Tensor:
    return pipe._unpack_latents(latents, height, width, pipe.vae_scale_factor)


def assert_same(found: Any, expected: Any, name: str) -> None:
    if isinstance(expected, dict):
        assert found.keys() == expected.keys(), name
        for inner, value in expected.items():
            assert_same(found[inner], value, f"{name}.{inner}")
    elif isinstance(expected, Tensor):
        assert found.shape == expected.shape and found.dtype == expected.dtype, name
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6, msg=name)
    else:
        assert found == expected, name


# The network's call


@pytest.mark.parametrize(
    "kind, size", [*((kind, (8, 8)) for kind in KINDS), ("sdxl", (16, 8)), ("flux", (8, 16))], ids=str
)
def test_the_network_is_called_as_by_the_pipeline(kind, size, calls):
    pipe, family, expected, outputs = calls(kind, *size)
    assert len(expected) == 2
    with torch.no_grad():
        conditions = family.conditions(pipe, CAPTIONS)
        if kind in GUIDED:
            empty = family.unconditional(pipe)
            conditions = {name: torch.cat([empty[name].expand_as(value), value]) for name, value in conditions.items()}
        for theirs, prediction in zip(expected, outputs, strict=True):
            noisy = theirs["hidden_states"] if "hidden_states" in theirs else theirs["sample"]
            if kind in FLUX:
                noisy, prediction = unpacked(pipe, noisy, *size), unpacked(pipe, prediction, *size)
            timesteps = theirs["timestep"].expand(len(noisy)) * (1000 if kind in FLUX else 1)
            network = pipe.components[family.network_name]
            ours, _, end = recorded_calls(network)
            found = family.predict(network, noisy, timesteps, conditions)
            end()
            assert found.shape == noisy.shape
            torch.testing.assert_close(found, prediction, rtol=0, atol=1e-5)
            assert len(ours) == 1 and ours[0].keys() == theirs.keys()
            for name, value in theirs.items():
                if name == "timestep":  # UNets take one for the whole batch, too
                    value = value.expand(len(noisy)).to(ours[0][name].dtype)
                assert_same(ours[0][name], value, name)


@pytest.mark.parametrize("kind", KINDS)
def test_times_are_those_of_the_pipelines_sampler(kind, calls):
    pipe, _, expected, _ = calls(kind)
    process = process_of(pipe.scheduler)
    for theirs in expected:
        told = float(theirs["timestep"].flatten()[0]) * (1000 if kind in FLUX else 1)
        steps = process.model_timesteps(torch.arange(len(process))).double()
        if isinstance(process, Flow):  # a sampler of few steps meets times between those of the training schedule
            assert float((steps - told).abs().min()) < 3 and steps.max() == 1000
            assert float(steps[0]) == 1000 and torch.all(steps.diff() < 0)
        else:
            assert told in steps


def test_sizes_told_to_sdxl_are_those_of_the_picture(calls):
    _, _, expected, _ = calls("sdxl", 16, 8)
    assert expected[0]["added_cond_kwargs"]["time_ids"].tolist() == [[16, 8, 0, 0, 16, 8]] * 4


def test_distilled_guidance_is_told_where_the_network_takes_it(calls):
    assert calls("flux")[2][0]["guidance"].tolist() == [2.5, 2.5]
    assert "guidance" not in calls("flux-schnell")[2][0] and calls("flux-schnell")[1].guidance is None
    assert family_of(calls("flux")[0]).guidance == 3.5
    assert family_of(calls("sd")[0]).guidance is None


@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_a_prediction_are_their_own(kind, calls):
    pipe, family, _, _ = calls(kind)
    network = pipe.components[family.network_name]
    noisy = torch.randn(3, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    timesteps = torch.tensor([3.0, 500.0, 900.0])
    with torch.no_grad():
        conditions = family.conditions(pipe, [*CAPTIONS, ""])
        assert all(len(value) == 3 for value in conditions.values())
        whole = family.predict(network, noisy, timesteps, conditions)
        for row in range(3):
            one = slice(row, row + 1)
            own = {name: value[one] for name, value in conditions.items()}
            alone = family.predict(network, noisy[one], timesteps[one], own)
            torch.testing.assert_close(whole[one], alone, rtol=0, atol=1e-5)
    assert not torch.allclose(whole[0], whole[1])


# Captions


@pytest.mark.parametrize("kind", KINDS)
def test_a_caption_is_encoded_alike_in_any_company(kind, calls):
    pipe, family, _, _ = calls(kind)
    with torch.no_grad():
        together, alone = family.conditions(pipe, ["", *CAPTIONS]), family.conditions(pipe, CAPTIONS[1:])
    for name, value in alone.items():
        torch.testing.assert_close(together[name][2:], value, rtol=0, atol=1e-5)
        assert not torch.allclose(together[name][0], together[name][1]), name


@pytest.mark.parametrize("kind", FLUX)
def test_flux_compares_with_an_empty_caption_as_its_true_guidance_does(kind, calls):
    pipe, family, _, _ = calls(kind)
    seen, _, end = recorded_calls(pipe.transformer)
    options = {"num_inference_steps": 1, "height": 8, "width": 8, "output_type": "latent"}
    pipe(CAPTIONS[0], negative_prompt="", true_cfg_scale=2.0, guidance_scale=2.5, **options)
    end()
    with torch.no_grad():
        empty = family.unconditional(pipe)
    assert_same(empty["states"], seen[1]["encoder_hidden_states"], "states")
    assert_same(empty["pooled"], seen[1]["pooled_projections"], "pooled")


def test_sdxl_compares_with_zeros_and_an_empty_caption_is_something_else(calls):
    pipe, family, _, _ = calls("sdxl")
    assert not any(value.any() for value in family.unconditional(pipe).values())
    assert all(value.any() for value in family.conditions(pipe, [""]).values())


@pytest.mark.parametrize("kind", KINDS)
def test_what_reads_captions_is_named(kind, calls):
    pipe, family, _, _ = calls(kind)
    rest = pipe.components.keys() - set(family.captioned_by) - {"vae", "scheduler", family.network_name}
    assert {name for name in rest if pipe.components[name] is not None} == set()


# Latents


@pytest.mark.parametrize("kind", KINDS)
def test_latents_are_decoded_as_by_the_pipeline(kind, calls):
    pipe, family, _, _ = calls(kind)
    options = {"num_inference_steps": 1, "height": 8, "width": 8}
    latents, images = (
        pipe(CAPTIONS, generator=torch.Generator().manual_seed(1), output_type=output, **options).images
        for output in ("latent", "pt")
    )
    latents = unpacked(pipe, latents, 8, 8) if kind in FLUX else latents
    with torch.no_grad():
        torch.testing.assert_close(family.decode(pipe.vae, latents), images, rtol=0, atol=1e-6)
        raw = torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(2))
        decoded = (pipe.vae.decode(raw).sample / 2 + 0.5).clamp(0, 1)
        torch.testing.assert_close(family.decode(pipe.vae, family.scaled(raw)), decoded, rtol=0, atol=1e-5)


# Which pipelines


def test_every_family_is_known_by_the_class_of_its_pipeline(calls):
    assert {type(calls(kind)[1]) for kind in KINDS} == set(FAMILIES.values())


def test_another_pipeline_is_refused_by_name(tiny_pipeline):
    other = StableDiffusionImg2ImgPipeline(**tiny_pipeline("sd").components, requires_safety_checker=False)
    with pytest.raises(UserError, match="StableDiffusionImg2ImgPipeline cannot be trained; known are StableDiffusionP"):
        family_of(other)


def test_a_folder_without_a_pipeline_is_named(tmp_path):
    with pytest.raises(UserError, match=r"holds no diffusers pipeline \(model_index.json is missing\)"):
        load_pipeline(tmp_path)
    with pytest.raises(UserError, match="no pipeline could be loaded from nobody/nothing"):
        load_pipeline("nobody/nothing")
    (tmp_path / "model_index.json").write_text("{")
    with pytest.raises(UserError, match="no pipeline could be loaded from"):
        load_pipeline(tmp_path)
