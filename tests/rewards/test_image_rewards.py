"""Rewards of images: numbers worked out with PIL and numpy, a CLIP scorer against its own features, and bad rows."""

import io
import logging
import math
import string

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPProcessor, CLIPTokenizer

from llmalign.errors import UserError
from llmalign.rewards.images import IMAGES_PER_BATCH, ImageReward, load_image_reward

SIDE, LENGTH = 16, 77
SOURCE = """
from llmalign.errors import UserError

def width(prompts, images, **columns):
    return [float(image.width) for image in images]

def with_weight(prompts, images, weight):
    return [own * len(prompt) for own, prompt in zip(weight, prompts)]

async def slow(prompts, images, **columns):
    return [float(image.height) for image in images]

def refuses(prompts, images, **columns):
    raise UserError("there is no scorer here")
"""


def noise(seed, size=(24, 24)):
    """An image of random colours, which compresses badly."""
    values = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(values)


def flat(colour, size=(24, 24), mode="RGB"):
    return Image.new(mode, size, colour)


def broken():
    """An image that PIL has opened, and that cannot be read to its end."""
    encoded = io.BytesIO()
    noise(0).save(encoded, format="PNG")
    return Image.open(io.BytesIO(encoded.getvalue()[:300]))


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        (flat((0, 0, 0)), 0.0),
        (flat((255, 255, 255)), 1.0),
        (flat((255, 0, 0)), 1 / 3),
        (flat((30, 60, 120)), 70 / 255),
        (flat(51, mode="L"), 0.2),
        (flat((255, 255, 255, 0), mode="RGBA"), 1.0),  # transparency is left out, not laid on a background
        (Image.fromarray(np.repeat(np.array([[0, 255], [51, 51]], dtype=np.uint8)[..., None], 3, axis=2)), 357 / 1020),
    ],
)
def test_brightness_is_the_mean_of_the_colours(image, expected):
    (found,) = load_image_reward("brightness")(["p"], [image])
    assert found.dtype == torch.float32 and float(found) == pytest.approx(expected, abs=1e-6)


def test_compressibility_is_the_size_of_the_jpeg_in_kilobytes():
    images = [flat((9, 9, 9)), noise(1), noise(2, (40, 20)), flat(7, mode="L")]
    expected = []
    for image in images:
        encoded = io.BytesIO()
        image.convert("RGB").save(encoded, "JPEG", quality=95)
        expected.append(len(encoded.getvalue()) / 1000)
    prompts = ["p"] * len(images)
    torch.testing.assert_close(load_image_reward("incompressibility")(prompts, images), torch.tensor(expected))
    torch.testing.assert_close(load_image_reward("compressibility")(prompts, images), -torch.tensor(expected))
    assert expected[1] > 2 * expected[0]  # noise is larger than one colour


@pytest.mark.parametrize("name", ["brightness", "compressibility", "incompressibility"])
def test_an_unreadable_image_costs_itself_alone(name):
    reward = load_image_reward(name)
    found = reward(["a", "b", "c"], [noise(1), broken(), noise(2)])
    alone = reward(["a", "c"], [noise(1), noise(2)])
    assert found.isnan().tolist() == [False, True, False] and found[[0, 2]].tolist() == alone.tolist()
    assert reward.guarded.count == 1 and reward.__name__ == name


def test_no_images_have_no_rewards():
    assert load_image_reward("brightness")([], []).shape == (0,)


def test_prompts_and_images_are_pairs():
    with pytest.raises(UserError, match="got 1 prompts and 2 images"):
        load_image_reward("brightness")(["a"], [noise(1), noise(2)])


@pytest.fixture
def written(tmp_path):
    (tmp_path / "mine.py").write_text(SOURCE, encoding="utf-8")
    return tmp_path


def test_functions_of_one_s_own(written):
    images = [noise(1, (5, 9)), noise(2, (7, 3))]
    assert load_image_reward("mine.py:width", folder=written)(["a", "b"], images).tolist() == [5.0, 7.0]
    assert load_image_reward(f"{written}/mine.py:slow")(["a", "b"], images).tolist() == [9.0, 3.0]
    weighted = load_image_reward("mine.py:with_weight", folder=written)
    assert weighted(["a", "bcd"], images, weight=[0.5, 2.0]).tolist() == [0.5, 6.0]
    assert load_image_reward("llmalign.rewards.images:brightness")(["a"], [flat((255, 0, 255))]) == pytest.approx(2 / 3)
    with pytest.raises(UserError, match="there is no scorer here"):
        load_image_reward("mine.py:refuses", folder=written)(["a", "b"], images)


def test_bad_rows_of_a_function_are_nan_and_counted(caplog):
    def reward(prompts, images, **columns):
        given = {"nan": math.nan, "inf": math.inf, "text": "x", "none": None, "raises": "raises", "good": 2}
        values = [given[prompt] for prompt in prompts]
        if "raises" in prompts:
            raise ZeroDivisionError("division by zero")
        return values

    own = ImageReward(reward, "mine")
    with caplog.at_level(logging.WARNING):
        found = own(["good", "nan", "inf", "text", "none", "raises", "good"], [noise(1)] * 7)
    assert found.isnan().tolist() == [False, True, True, True, True, True, False] and found[[0, 6]].tolist() == [2, 2]
    assert own.guarded.count == 4  # None says that it does not apply, which is no failure
    assert own.guarded.messages["ZeroDivisionError: division by zero"] == 1
    assert "Reward function mine, row 5: ZeroDivisionError: division by zero" in caplog.text


@pytest.mark.parametrize("wrong", [[1.0], [1.0] * 4, 1.0, None])
def test_a_wrong_length_is_repaired_row_by_row(wrong):
    own = ImageReward(lambda prompts, images: wrong if len(images) > 1 else [float(images[0].width)])
    assert own(["a"] * 3, [noise(0, (n, 4)) for n in (3, 4, 5)]).tolist() == [3.0, 4.0, 5.0]
    never = ImageReward(lambda prompts, images: [1.0, 2.0])
    assert never(["a"], [noise(0)]).isnan().all() and never.guarded.messages == {"gave 2 rewards instead of 1": 1}


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("brigthness", "there is no image reward 'brigthness'; the nearest is 'brightness'; known are"),
        ("compresibility", "the nearest is 'compressibility'"),
        ("aesthetics", "there is no image reward 'aesthetics'; known are: brightness, compressibility"),
        ("clip:", "'clip:' names no model: write clip:FOLDER or clip:HUB_NAME"),
        ("clip:./nowhere", "there is no folder './nowhere'"),
        ("clip:no/such-model", "no CLIP scorer could be loaded from 'no/such-model'"),
        ("mine.py:heigth", "has no 'heigth'"),
        ("mine.py:wdith", "has no 'wdith'; the nearest is 'width'"),
        ("no_such_module:f", "there is no module 'no_such_module'"),
    ],
)
def test_unknown_names_are_refused_in_a_sentence(written, name, words):
    with pytest.raises(UserError) as refused:
        load_image_reward(name, folder=written)
    assert words in str(refused.value) and "\n" not in str(refused.value)


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    """A CLIP model of two layers with one token a letter, and its processor, saved in a folder."""
    letters = [*string.ascii_lowercase, *(f"{letter}</w>" for letter in string.ascii_lowercase)]
    vocabulary = {token: i for i, token in enumerate([*letters, "<|startoftext|>", "<|endoftext|>"])}
    tokenizer = CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=10**6)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    bos, eos = (vocabulary[token] for token in ("<|startoftext|>", "<|endoftext|>"))
    text = {"vocab_size": len(vocabulary), "bos_token_id": bos, "eos_token_id": eos, "pad_token_id": eos, **sizes}
    vision = {"image_size": SIDE, "patch_size": 8, **sizes}
    state = torch.get_rng_state()
    torch.manual_seed(0)
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8, logit_scale_init_value=4.6))
    torch.set_rng_state(state)
    folder = tmp_path_factory.mktemp("clip")
    crop = {"height": SIDE, "width": SIDE}
    images = CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size=crop)
    model.save_pretrained(folder)
    CLIPProcessor(images, tokenizer).save_pretrained(folder)
    return folder


def token_ids(prompt):
    """One token a letter, the last of a word with its end; between begin and end of text, cut to the model's length."""
    letters = string.ascii_lowercase
    inner = [letters.index(letter) + 26 * last for word in prompt.split() for letter, last in marked(word)]
    return [52, *inner[: LENGTH - 2], 53]


def marked(word):
    return [(letter, place == len(word) - 1) for place, letter in enumerate(word)]


def prepared(image):
    """Shorter side to 16 bicubic, centre crop, OpenAI's mean and deviation: (1, 3, 16, 16)."""
    scale = SIDE / min(image.size)
    image = image.convert("RGB").resize([int(side * scale) for side in image.size], Image.Resampling.BICUBIC)
    left, top = ((side - SIDE) // 2 for side in image.size)
    values = np.asarray(image.crop((left, top, left + SIDE, top + SIDE)), dtype=np.float64) / 255
    mean, deviation = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    return torch.tensor((values - mean) / deviation, dtype=torch.float32).permute(2, 0, 1)[None]


@torch.no_grad()
def by_hand(model, prompt, image):
    text = model.get_text_features(input_ids=torch.tensor([token_ids(prompt)])).pooler_output[0].double()
    pixels = model.get_image_features(pixel_values=prepared(image)).pooler_output[0].double()
    return float(text @ pixels / (text.norm() * pixels.norm())) * math.exp(4.6)


def test_clip_scores_are_cosines_times_the_model_s_scale(clip_folder):
    model = CLIPModel.from_pretrained(clip_folder).eval()
    reward = load_image_reward(f"clip:{clip_folder}")
    prompts = ["a cat", "two dogs on a hill", "x", "a cat"]
    images = [noise(1, (16, 16)), noise(2, (40, 22)), flat((200, 10, 60), (16, 64)), flat(90, (30, 30), "L")]
    expected = torch.tensor([by_hand(model, *pair) for pair in zip(prompts, images, strict=True)])
    found = reward(prompts, images)
    assert not found.requires_grad and expected.std() > 1
    torch.testing.assert_close(found, expected, atol=2e-3, rtol=0)
    # Together or alone, in one batch or in several: an image's reward is its own.
    alone = torch.cat([reward([prompt], [image]) for prompt, image in zip(prompts, images, strict=True)])
    torch.testing.assert_close(found, alone, atol=1e-4, rtol=0)
    repeats = 1 + IMAGES_PER_BATCH // len(prompts)
    torch.testing.assert_close(reward(prompts * repeats, images * repeats), found.repeat(repeats), atol=1e-4, rtol=0)


def test_long_prompts_are_cut_at_the_model_s_length_and_counted(clip_folder, caplog):
    model = CLIPModel.from_pretrained(clip_folder).eval()
    reward = load_image_reward(f"clip:{clip_folder}")
    long, just = "dog " * 40, "ab " * 37 + "c"  # 120 and 75 letters
    assert len(token_ids(just)) == LENGTH
    with caplog.at_level(logging.WARNING):
        found = reward([long, just], [noise(1), noise(1)])
        reward([long], [noise(1)])
    expected = torch.tensor([by_hand(model, prompt, noise(1)) for prompt in (long, just)])
    torch.testing.assert_close(found, expected, atol=2e-3, rtol=0)
    assert reward.guarded.function.truncated == 2 and caplog.text.count("prompts exceed the scorer's 77 tokens") == 1


def test_an_unreadable_image_costs_a_scorer_that_image_alone(clip_folder):
    reward = load_image_reward(f"clip:{clip_folder}")
    found = reward(["a", "b", "c"], [noise(1), broken(), noise(2)])
    torch.testing.assert_close(found[[0, 2]], reward(["a", "c"], [noise(1), noise(2)]), atol=1e-4, rtol=0)
    assert found.isnan().tolist() == [False, True, False] and reward.guarded.count == 1


def test_the_processor_may_lie_elsewhere(clip_folder, tmp_path):
    CLIPModel.from_pretrained(clip_folder).save_pretrained(tmp_path / "bare")
    with pytest.raises(UserError, match="its processor beside it"):
        load_image_reward(f"clip:{tmp_path}/bare")
    found = load_image_reward(f"clip:{tmp_path}/bare,{clip_folder}")(["a cat"], [noise(1)])
    assert found.tolist() == load_image_reward(f"clip:{clip_folder}")(["a cat"], [noise(1)]).tolist()
    with pytest.raises(UserError, match="there is no folder './nowhere'"):
        load_image_reward(f"clip:{tmp_path}/bare,./nowhere")


def test_what_is_no_whole_clip_model_is_refused(clip_folder, tiny_model_dir, tmp_path):
    with pytest.raises(UserError, match="is LlamaModel with .*, and clip: takes a CLIPModel with a CLIPProcessor"):
        load_image_reward(f"clip:{tiny_model_dir}")
    model = CLIPModel.from_pretrained(clip_folder)
    state = {name: value for name, value in model.state_dict().items() if not name.startswith("text_projection")}
    model.save_pretrained(tmp_path / "part", state_dict=state)
    with pytest.raises(UserError, match="lacks text_projection.weight, which would be drawn at random"):
        load_image_reward(f"clip:{tmp_path}/part,{clip_folder}")
    weights = tmp_path / "part" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(UserError, match="no CLIP scorer could be loaded from"):
        load_image_reward(f"clip:{tmp_path}/part,{clip_folder}")
