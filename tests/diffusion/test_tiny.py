"""Random pipelines of every architecture: they run, survive a folder, and tokenise as the released ones do."""

from pathlib import Path

import pytest
import torch
from diffusers import AutoPipelineForText2Image, DiffusionPipeline

from llmalign.diffusion.tiny import (
    KINDS,
    LATENT_CHANNELS,
    LATENT_SIZE,
    build_tiny,
    ensure_tiny_pipeline,
    t5_tokenizer,
    word_tokenizer,
)
from llmalign.errors import UserError

CLASSES = {
    "sd": "StableDiffusionPipeline",
    "sd2": "StableDiffusionPipeline",
    "sdxl": "StableDiffusionXLPipeline",
    "sd3": "StableDiffusion3Pipeline",
    "flux": "FluxPipeline",
    "flux-schnell": "FluxPipeline",
}


def weights(pipe: DiffusionPipeline) -> dict[str, torch.Tensor]:
    return {
        f"{name}.{key}": value
        for name, part in pipe.components.items()
        if isinstance(part, torch.nn.Module)
        for key, value in part.state_dict().items()
    }


def draw(pipe: DiffusionPipeline, prompt: str | list[str], **arguments) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    arguments = {"num_inference_steps": 2, "height": 8, "width": 8, "output_type": "pt", **arguments}
    return pipe(prompt, generator=generator, **arguments).images


@pytest.mark.parametrize("kind", KINDS)
def test_pipeline_from_a_folder_equals_the_one_that_was_built(kind: str, tiny_folder, tiny_pipeline) -> None:
    built, loaded = build_tiny(kind), tiny_pipeline(kind)
    assert type(loaded).__name__ == CLASSES[kind]
    assert not list(tiny_folder(kind).rglob("*.bin"))
    expected, found = weights(built), weights(loaded)
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name
        assert value.dtype == torch.float32 or not value.is_floating_point(), name
    assert not any(part.training for part in loaded.components.values() if isinstance(part, torch.nn.Module))


@pytest.mark.parametrize("kind", KINDS)
def test_pipeline_draws_what_it_is_asked_for(kind: str, tiny_pipeline) -> None:
    pipe = tiny_pipeline(kind)
    images = draw(pipe, ["digit seven", "a red picture"])
    assert images.shape == (2, 3, 8, 8) and images.isfinite().all()
    assert torch.equal(draw(pipe, ["digit seven", "a red picture"]), images)
    assert not torch.equal(draw(pipe, ["digit three", "a red picture"])[0], images[0])
    latents = draw(pipe, "digit seven", output_type="latent")
    assert latents.numel() == LATENT_CHANNELS * LATENT_SIZE**2


@pytest.mark.parametrize("kind", ["sd", "sd2", "sdxl", "sd3"])
def test_size_is_the_pipelines_own(kind: str, tiny_pipeline) -> None:
    image = draw(tiny_pipeline(kind), "digit seven", height=None, width=None)
    assert image.shape == (1, 3, 8, 8)


@pytest.mark.parametrize("kind", KINDS)
def test_diffusers_knows_the_pipeline(kind: str, tiny_folder) -> None:
    pipe = AutoPipelineForText2Image.from_pretrained(tiny_folder(kind), use_safetensors=True)
    assert type(pipe).__name__ == CLASSES[kind]


def test_seed_sets_the_weights_and_leaves_the_callers_state() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first, same, other = build_tiny("sd"), build_tiny("sd", seed=0), build_tiny("sd", seed=1)
    assert torch.equal(torch.rand(3), expected)
    assert all(torch.equal(value, weights(same)[name]) for name, value in weights(first).items())
    assert not torch.equal(first.unet.conv_in.weight, other.unet.conv_in.weight)


def test_schedules_are_those_of_the_released_models() -> None:
    first, second = build_tiny("sd").scheduler, build_tiny("sd2").scheduler
    assert (first.config.prediction_type, second.config.prediction_type) == ("epsilon", "v_prediction")
    for scheduler in (first, second):
        scheduler.set_timesteps(20)
        assert (scheduler.timesteps[0].item(), scheduler.timesteps[-1].item()) == (951, 1)
        # The root of alpha-bar at t = 0 and its value at the end: 1 - .00085 and the .0047 of "zero-SNR" papers.
        assert scheduler.final_alpha_cumprod.item() == pytest.approx(1 - 0.00085)
        assert scheduler.alphas_cumprod[-1].item() == pytest.approx(0.0047, abs=5e-5)
    assert build_tiny("flux").transformer.config.guidance_embeds
    assert not build_tiny("flux-schnell").transformer.config.guidance_embeds


@pytest.mark.parametrize("kind", KINDS)
def test_pipeline_is_tiny(kind: str, tiny_pipeline) -> None:
    assert sum(value.numel() for value in weights(tiny_pipeline(kind)).values()) < 120_000


def test_unknown_kind_is_named() -> None:
    with pytest.raises(UserError, match="kind 'sd15'; choose one of sd, sd2, sdxl"):
        build_tiny("sd15")


def test_tiny_pipeline_is_built_once_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMALIGN_CACHE", str(tmp_path))
    folder = ensure_tiny_pipeline()
    assert folder.parent == tmp_path
    index = folder / "model_index.json"
    index.write_text(index.read_text() + "\n")
    assert ensure_tiny_pipeline() == folder and index.read_text().endswith("\n\n")
    assert torch.equal(
        DiffusionPipeline.from_pretrained(folder).unet.conv_in.weight, build_tiny("sd").unet.conv_in.weight
    )


def test_every_word_is_one_token() -> None:
    # Made so that a merge learnt for one word ("s"+"e" of "sea") gets in the way of another ("tenser").
    words = ["sea", "tense", "tenser", "sense", "senses", "nest", "tens"]
    tokenizer = word_tokenizer(words, max_length=9)
    assert tokenizer.tokenize(" ".join(words)) == [word + "</w>" for word in words]
    ids = tokenizer("Sea  NEST", padding="max_length").input_ids
    start, end = len(tokenizer) - 2, len(tokenizer) - 1
    assert ids == [start, *tokenizer.convert_tokens_to_ids(["sea</w>", "nest</w>"]), *[end] * 6]


def test_captions_may_be_given_whole() -> None:
    tokenizer = word_tokenizer(["Élan: a goblin's sword"])
    assert tokenizer.tokenize("a goblin's élan") == ["a</w>", "goblin</w>", "'s</w>", "Ã©lan</w>"]


def test_what_is_no_word_of_the_texts_falls_apart_but_is_not_lost() -> None:
    tokenizer = word_tokenizer(["digit"], max_length=20)
    assert tokenizer.tokenize("dig 7 ü!") == ["di", "g</w>", "7</w>", "Ã", "¼</w>", "!</w>"]
    assert tokenizer.unk_token_id not in tokenizer("dig 7 ü! 😀", add_special_tokens=False).input_ids


def test_order_of_the_texts_changes_nothing() -> None:
    assert word_tokenizer(["red blue", "green"]).get_vocab() == word_tokenizer(["green blue", "red"]).get_vocab()


def test_tokenizers_survive_a_folder(tmp_path: Path) -> None:
    for tokenizer in (word_tokenizer(["digit seven"], pad_token="!"), t5_tokenizer(["digit seven"])):
        tokenizer.save_pretrained(tmp_path / type(tokenizer).__name__)
        again = type(tokenizer).from_pretrained(tmp_path / type(tokenizer).__name__)
        texts = ["digit seven", "Digit 7!", "", "one two three four five six seven eight nine ten"]
        kept = {"padding": "max_length", "truncation": True}
        assert again(texts, **kept).input_ids == tokenizer(texts, **kept).input_ids
        assert again.model_max_length == tokenizer.model_max_length


def test_t5_tokens() -> None:
    tokenizer = t5_tokenizer(["digit seven"])
    assert tokenizer.tokenize("digit seven, Z") == ["▁digit", "▁seven", ",", "▁", "Z"]
    assert tokenizer("seven").input_ids[-1] == tokenizer.eos_token_id == 1
    assert tokenizer.pad_token_id == 0 and tokenizer.unk_token_id == 2
