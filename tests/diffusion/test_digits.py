"""Small pipelines trained on captioned pictures, and the digits among them."""

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline
from PIL import Image

from llmalign.diffusion import digits
from llmalign.diffusion.base import (
    BaseSettings,
    build_text_encoder,
    encode_captions,
    encode_images,
    train_pipeline,
    train_unet,
    train_vae,
)
from llmalign.diffusion.digits import PROMPTS, DigitClassifier, digit_images, ensure_digits, train_digits
from llmalign.diffusion.tiny import DDIM, word_tokenizer
from llmalign.errors import UserError

SMALL = BaseSettings(vae_channels=(8, 16), unet_channels=(16, 32), text_width=16)
FEWEST = replace(SMALL, vae_steps=2, unet_steps=2)


def tiles(count: int, size: int = 8) -> tuple[torch.Tensor, list[str]]:
    """Random pictures under two captions."""
    images = torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(0)) * 2 - 1
    return images, [f"{name} tile" for name in ("red", "blue")] * (count // 2)


def draw(folder: Path, prompts: list[str], seed: int = 0, steps: int = 10) -> list[Image.Image]:
    pipe = DiffusionPipeline.from_pretrained(folder, use_safetensors=True)
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(seed)
    return pipe(prompts, num_inference_steps=steps, guidance_scale=2.0, generator=generator).images


def test_unet_learns_what_captions_mean() -> None:
    patterns = torch.randn(4, 4, 4, 4, generator=torch.Generator().manual_seed(0)).sign()
    captions = torch.arange(1, 5).repeat(8)
    words = torch.randn(4, 1, 16, generator=torch.Generator().manual_seed(1)).expand(-1, 8, -1)
    embeddings = torch.cat([torch.zeros(1, 8, 16), words])
    latents, scheduler = patterns[captions - 1], DDIMScheduler(**DDIM)
    torch.manual_seed(0)
    settings = replace(SMALL, unet_channels=(16, 16), unet_steps=60, unet_rate=2e-2)
    unet = train_unet(latents, embeddings, captions, scheduler, settings, progress=False)
    assert not unet.training and not any(weight.requires_grad for weight in unet.parameters())
    noise, timesteps = torch.randn_like(latents), torch.full((32,), 600)
    noisy = scheduler.add_noise(latents, noise, timesteps)
    right, none, wrong = (
        (unet(noisy, timesteps, embeddings[ids]).sample - noise).pow(2).mean().item()
        for ids in (captions, torch.zeros_like(captions), captions % 4 + 1)
    )
    assert right < none < wrong
    assert right < 0.85 * wrong and wrong < 0.3  # the noise has variance 1


def test_folder_holds_a_pipeline_of_the_pictures_size(tmp_path: Path) -> None:
    settings = replace(FEWEST, vae_channels=(8, 8, 8), max_length=6)
    assert train_pipeline(*tiles(6, size=32), str(tmp_path / "made"), settings, progress=False) == tmp_path / "made"
    pipe = DiffusionPipeline.from_pretrained(tmp_path / "made")
    assert type(pipe).__name__ == "StableDiffusionPipeline"
    assert (pipe.unet.config.sample_size, pipe.vae.config.latent_channels) == (8, 4)
    assert pipe.scheduler.config.prediction_type == "epsilon" and pipe.scheduler.config.steps_offset == 1
    assert pipe.tokenizer.tokenize("blue tile") == ["blue</w>", "tile</w>"] and pipe.tokenizer.model_max_length == 6
    assert draw(tmp_path / "made", ["red tile"], steps=2)[0].size == (32, 32)


def weights(folder: Path) -> torch.Tensor:
    pipe = DiffusionPipeline.from_pretrained(folder)
    return torch.cat(
        [value.flatten() for part in (pipe.vae, pipe.unet, pipe.text_encoder) for value in part.parameters()]
    )


def test_seed_settles_the_weights_and_the_callers_state_stays(tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    for name, seed in (("first", 0), ("same", 0), ("other", 1)):
        train_pipeline(*tiles(6), tmp_path / name, FEWEST, seed, progress=False)
    assert torch.equal(torch.rand(2), expected)
    assert torch.get_num_threads() == threads
    first = weights(tmp_path / "first")
    assert torch.equal(first, weights(tmp_path / "same"))
    assert not torch.equal(first, weights(tmp_path / "other"))


def test_autoencoder_learns_and_its_latents_have_unit_variance() -> None:
    images = digit_images()[0][:256]
    errors = []
    for steps in (1, 40):
        torch.manual_seed(0)
        vae = train_vae(images, replace(SMALL, vae_steps=steps, vae_rate=1e-2), progress=False)
        latents = encode_images(vae, images)
        assert latents.shape == (256, 4, 4, 4)
        assert latents.std().item() == pytest.approx(1, abs=1e-5)
        errors.append((vae.decode(latents / vae.config.scaling_factor).sample - images).pow(2).mean().item())
    assert errors[1] < 0.4 * errors[0]
    assert not vae.training and not any(weight.requires_grad for weight in vae.parameters())


def test_captions_are_encoded_once_and_can_be_told_apart() -> None:
    torch.manual_seed(0)
    tokenizer = word_tokenizer(PROMPTS)
    encoder = build_text_encoder(tokenizer, BaseSettings())
    captions = [PROMPTS[place] for place in (3, 1, 3, 0)]
    embeddings, places = encode_captions(tokenizer, encoder, captions)
    assert places.tolist() == [1, 2, 1, 3]
    assert embeddings.shape == (4, 8, 32)
    for place, caption in enumerate(["", PROMPTS[3], PROMPTS[1], PROMPTS[0]]):
        ids = tokenizer([caption], padding="max_length", return_tensors="pt").input_ids
        torch.testing.assert_close(encoder(ids).last_hidden_state[0], embeddings[place], atol=1e-5, rtol=0)
    words, _ = encode_captions(tokenizer, encoder, PROMPTS)
    words = words[1:, 2]  # what stands where the digit is named: nearly all of it tells which
    assert (words - words.mean(0)).pow(2).mean() > 0.5 * words.pow(2).mean()


@pytest.mark.parametrize(
    ("images", "captions", "settings", "message"),
    [
        (torch.zeros(2, 1, 8, 8), 2, FEWEST, r"\(N, 3, S, S\), not as \(2, 1, 8, 8\)"),
        (torch.zeros(2, 3, 8, 4), 2, FEWEST, r"not as \(2, 3, 8, 4\)"),
        (torch.zeros(2, 3, 8, 8), 3, FEWEST, "2 pictures and 3 captions"),
        (torch.zeros(0, 3, 8, 8), 0, FEWEST, "0 pictures and 0 captions"),
        (torch.full((2, 3, 8, 8), 255.0), 2, FEWEST, r"\[-1, 1\], and these in \[255, 255\]"),
        (torch.full((2, 3, 8, 8), torch.nan), 2, FEWEST, r"these in \[nan, nan\]"),
        (torch.zeros(2, 3, 10, 10), 2, FEWEST, "10 pixels cannot be halved 2 times"),
        (torch.zeros(2, 3, 8, 8), 2, replace(FEWEST, vae_channels=(12,)), "12 in vae_channels is no multiple of 8"),
    ],
)
def test_what_does_not_fit_is_named(
    images: torch.Tensor, captions: int, settings: BaseSettings, message: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        train_pipeline(images, ["a tile"] * captions, tmp_path, settings)


def test_digits_are_scikit_learns() -> None:
    images, labels = digit_images()
    assert images.shape == (1797, 3, 8, 8) and images.dtype == torch.float32
    assert (images.min().item(), images.max().item()) == (-1, 1)
    assert labels.bincount().tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    # The first row of the first picture, from the data set's description: 0 0 5 13 9 1 0 0 of 16.
    assert ((images[0, 1, 0] + 1) * 8).tolist() == [0, 0, 5, 13, 9, 1, 0, 0]
    assert len(PROMPTS) == 10 and PROMPTS[7] == "digit seven"


def picture(image: torch.Tensor, size: int = 8) -> Image.Image:
    values = ((image + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
    return Image.fromarray(values).resize((size, size), Image.Resampling.NEAREST)


def test_classifier_reads_digits() -> None:
    images, labels = digit_images()
    classifier = DigitClassifier()
    pictures, true = [picture(image) for image in images[:200]], labels[:200].tolist()
    assert classifier.accuracy(pictures, true) > 0.97
    assert classifier.accuracy([picture(image, 32) for image in images[:200]], true) > 0.9
    wrong = [(label + 1) % 10 for label in true]
    assert classifier.accuracy(pictures, wrong) < 0.03
    found = classifier.predict(pictures)[:3]
    assert classifier.right(pictures[:3], [found[0], found[1] + 1, found[2]]) == [True, False, True]
    with pytest.raises(ValueError):
        classifier.right(pictures, true[:-1])


def test_digits_pipeline_is_trained_once_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def quickly(folder: Path, seed: int) -> Path:
        asked.append(seed)
        return train_digits(folder, seed, FEWEST, progress=False)

    monkeypatch.setenv("LLMALIGN_CACHE", str(tmp_path))
    monkeypatch.setattr(digits, "train_digits", quickly)
    folder = ensure_digits()
    assert ensure_digits() == folder and asked == [0]
    assert ensure_digits(1) != folder and asked == [0, 1]
    assert folder.parent == tmp_path and len(list(tmp_path.iterdir())) == 2
    pipe = DiffusionPipeline.from_pretrained(folder)
    assert [pipe.tokenizer.tokenize(prompt) for prompt in PROMPTS[:2]] == [
        ["digit</w>", "zero</w>"],
        ["digit</w>", "one</w>"],
    ]


def test_scikit_learn_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(UserError, match=r"pip install 'llmalign\[diffusion\]'"):
        digit_images()


@pytest.mark.slow
def test_digits_pipeline_obeys_its_prompts() -> None:
    labels = [place % 10 for place in range(300)]
    images = draw(ensure_digits(), [PROMPTS[label] for label in labels], steps=20)
    assert DigitClassifier().accuracy(images, labels) >= 0.95
    brightness = np.mean([np.asarray(image).mean() / 255 for image in images])
    assert brightness == pytest.approx((digit_images()[0].mean().item() + 1) / 2, abs=0.03)
