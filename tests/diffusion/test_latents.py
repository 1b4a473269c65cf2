"""Pictures and captions encoded once: what is kept equals what the encoders say, and is found again or made anew."""

from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset

from llmalign.data.images import decode, pixels
from llmalign.diffusion import latents
from llmalign.diffusion.latents import FLIPPED, LatentCollator, LatentRows, encode, moments_to_latents
from llmalign.diffusion.pipelines import family_of
from llmalign.errors import UserError
from tests.diffusion.training import CAPTIONS, pairs, png

SIDES = ("chosen", "rejected")


@pytest.fixture
def encoded(tmp_path):
    """Encode sets of rows into the test's own folder."""

    def run(pipe: Any, sets: dict[str, Dataset] | None = None, **changes: Any) -> LatentRows:
        options = {"images": SIDES, "resolution": 8, "flips": False, "folder": tmp_path / "cache", "batch_size": 3}
        device = torch.device("cpu")
        return encode(sets or {"train": pairs()}, pipe, family_of(pipe), device=device, **{**options, **changes})

    return run


class Calls:
    """Counts what the encoders of a pipeline are given."""

    def __init__(self, pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        self.pictures, self.captions = 0, []
        encode_image, encode_prompt = pipe.vae.encode, pipe.encode_prompt

        def count_pictures(stack: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            self.pictures += len(stack)
            return encode_image(stack, *args, **kwargs)

        def count_captions(captions: list[str], *args: Any, **kwargs: Any) -> Any:
            self.captions += captions
            return encode_prompt(captions, *args, **kwargs)

        monkeypatch.setattr(pipe.vae, "encode", count_pictures)
        monkeypatch.setattr(pipe, "encode_prompt", count_captions)

    def take(self) -> tuple[int, list[str]]:
        """Pictures and captions since the last time, without the one of each that shapes are read from."""
        taken = self.pictures - 1, self.captions[1:]
        self.pictures, self.captions = 0, []
        return taken


def moments_of(pipe: Any, data: bytes, flipped: bool = False) -> torch.Tensor:
    stack = pixels(decode(data), 8)[None]
    with torch.no_grad():
        posterior = pipe.vae.encode(stack.flip(-1) if flipped else stack).latent_dist
    return torch.cat([posterior.mean, posterior.std], dim=1)[0]


# What is kept


@pytest.mark.parametrize("kind", ["sd", "sd3"])
def test_moments_are_the_encoders_and_so_are_those_of_the_mirror_image(kind, tiny_pipeline, encoded):
    pipe, rows = tiny_pipeline(kind), pairs()
    coded = encoded(pipe, {"train": rows}, flips=True)
    assert coded.latent_shape == (4, 4, 4)
    batch = LatentCollator(coded, SIDES)([coded.sets["train"][place] for place in (5, 2)])
    for place, row in enumerate((5, 2)):
        for side in SIDES:
            for name, flipped in ((side, False), (side + FLIPPED, True)):
                expected = moments_of(pipe, rows[row][side], flipped)
                torch.testing.assert_close(batch[name][place], expected, rtol=0, atol=1e-5, msg=name)
    assert not torch.allclose(batch["chosen"], batch["chosen" + FLIPPED], atol=1e-2)


def test_latents_are_a_sample_of_what_the_vae_says(tiny_pipeline):
    pipe = tiny_pipeline("sd3")
    family = family_of(pipe)
    stack = torch.stack([pixels(decode(png(seed)), 8) for seed in range(2)])
    with torch.no_grad():
        posterior = pipe.vae.encode(stack).latent_dist
        moments = torch.cat([posterior.mean, posterior.std], dim=1)
        sample = posterior.sample(torch.Generator().manual_seed(3))
    noise = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(3))
    scale = pipe.vae.config.scaling_factor, pipe.vae.config.shift_factor
    assert scale == (1.5305, 0.0609)
    torch.testing.assert_close(
        moments_to_latents(moments, noise, family), (sample - scale[1]) * scale[0], rtol=0, atol=1e-5
    )
    torch.testing.assert_close(
        moments_to_latents(moments, None, family), (posterior.mode() - scale[1]) * scale[0], rtol=0, atol=1e-6
    )


@pytest.mark.parametrize("kind", ["sd", "sdxl", "sd3", "flux"])
def test_conditions_are_the_pipelines_own_and_each_caption_is_encoded_once(kind, tiny_pipeline, encoded, monkeypatch):
    pipe = tiny_pipeline(kind)
    calls = Calls(pipe, monkeypatch)
    rows = pairs(9)
    coded = encoded(pipe, {"train": rows, "eval": pairs(3, seed=1, captions=("a green picture", "digit one"))})
    expected = ["", *sorted({*CAPTIONS, "a green picture"} - {""})]
    assert calls.take()[1] == expected == coded.texts
    batch = LatentCollator(coded, SIDES)([coded.sets["train"][place] for place in range(9)])
    with torch.no_grad():
        conditions = family_of(pipe).conditions(pipe, list(rows["caption"]))
        empty = family_of(pipe).conditions(pipe, [""])
    assert batch["conditions"].keys() == conditions.keys()
    for name, value in conditions.items():
        torch.testing.assert_close(batch["conditions"][name], value, rtol=0, atol=1e-5)
        torch.testing.assert_close(coded.empty()[name], empty[name], rtol=0, atol=1e-5)
    assert [coded.texts[place] for place in batch["caption_id"]] == list(rows["caption"])


def test_a_batch_has_what_training_reads(tiny_pipeline, encoded):
    rows = pairs(4, labels=(1.0, 0.5, 0.75)).add_column("flipped", [True, False, False, True])
    coded = encoded(tiny_pipeline("sd"), {"train": rows})
    assert set(coded.sets["train"].column_names) == {"row_id", "label", "flipped", "caption_id", *SIDES}
    batch = LatentCollator(coded, SIDES)([coded.sets["train"][place] for place in (3, 1)])
    assert batch["row_id"].tolist() == [3, 1] and batch["row_id"].dtype == torch.int64
    assert batch["label"].tolist() == [1.0, 0.5] and batch["label"].dtype == torch.float32
    assert batch["flipped"].tolist() == [True, False] and batch["flipped"].dtype == torch.bool
    assert batch["chosen"].shape == (2, 8, 4, 4) and batch["chosen"].dtype == torch.float32


def test_captions_alone(tiny_pipeline, encoded, monkeypatch):
    pipe = tiny_pipeline("sd")
    calls = Calls(pipe, monkeypatch)
    rows = pairs(4).select_columns(["row_id", "caption"])
    coded = encoded(pipe, {"train": rows.select([2, 0, 3])}, images=())
    assert calls.pictures == 0 and coded.latent_shape == ()
    assert [coded.texts[place] for place in coded.sets["train"]["caption_id"]] == [
        CAPTIONS[2],
        CAPTIONS[0],
        CAPTIONS[3],
    ]
    assert list(coded.sets["train"]["row_id"]) == [2, 0, 3]
    batch = LatentCollator(coded, ())([coded.sets["train"][0]])
    assert batch.keys() == {"row_id", "caption_id", "conditions"}


# Found again, or made anew


def test_what_is_kept_is_not_encoded_again(tiny_pipeline, encoded, monkeypatch):
    first = encoded(tiny_pipeline("sd"))
    pipe = tiny_pipeline("sd")
    calls = Calls(pipe, monkeypatch)
    again = encoded(pipe, {"train": pairs()})
    assert calls.take() == (0, [])
    assert again.sets["train"].to_dict() == first.sets["train"].to_dict()
    assert again.captions.to_dict() == first.captions.to_dict()


@pytest.mark.parametrize("what", ["resolution", "vae", "rows", "flips", "one picture", "images"])
def test_what_would_come_out_different_is_encoded_anew(what, tiny_pipeline, encoded, monkeypatch):
    encoded(tiny_pipeline("sd"))
    pipe = tiny_pipeline("sd")
    rows, options = pairs(), {}
    if what == "resolution":
        options["resolution"] = 16
    elif what == "flips":
        options["flips"] = True
    elif what == "images":
        options["images"] = ("rejected", "chosen")
    elif what == "rows":
        rows = rows.select(range(1, 8))
    elif what == "one picture":
        rows = pairs().map(lambda row: {"chosen": png(77)} if row["row_id"] == 5 else {})
    else:
        with torch.no_grad():
            pipe.vae.encoder.conv_in.bias[0] += 1e-3
    calls = Calls(pipe, monkeypatch)
    coded = encoded(pipe, {"train": rows}, **options)
    assert calls.take() == (2 * len(rows) * (1 + (what == "flips")), [])
    if what == "one picture":
        batch = LatentCollator(coded, SIDES)([coded.sets["train"][5]])
        torch.testing.assert_close(batch["chosen"][0], moments_of(pipe, png(77)), rtol=0, atol=1e-5)


def test_another_text_encoder_reads_the_captions_anew(tiny_pipeline, encoded, monkeypatch):
    encoded(tiny_pipeline("sdxl"))
    pipe = tiny_pipeline("sdxl")
    with torch.no_grad():
        next(pipe.text_encoder_2.parameters())[0] += 1e-3
    calls = Calls(pipe, monkeypatch)
    encoded(pipe)
    assert calls.take() == (0, ["", *sorted(set(CAPTIONS) - {""})])


def test_captions_of_another_set_do_not_move_those_that_are_kept(tiny_pipeline, encoded, monkeypatch):
    rows = pairs()
    encoded(tiny_pipeline("sd"), {"train": rows})
    pipe = tiny_pipeline("sd")
    calls = Calls(pipe, monkeypatch)
    more = pairs(2, seed=1, captions=("a blue picture", "zero"))  # in between the others in order
    coded = encoded(pipe, {"train": rows, "eval": more})
    assert calls.take()[0] == 2 * len(more), "the rows that are kept are encoded again"
    for name, expected in (("train", rows), ("eval", more)):
        found = [coded.texts[place] for place in coded.sets[name]["caption_id"]]
        assert found == list(expected["caption"]), name


def test_parts_make_up_the_whole(tiny_pipeline, encoded, tmp_path, monkeypatch):
    whole = encoded(tiny_pipeline("sd"), {"train": pairs(7)}, folder=tmp_path / "whole").sets["train"]
    monkeypatch.setattr(latents, "PART_ROWS", 3)
    parts = encoded(tiny_pipeline("sd"), {"train": pairs(7)}, folder=tmp_path / "parts").sets["train"]
    assert len(list((tmp_path / "whole").glob("*.arrow"))) == 2  # captions and rows
    assert len(list((tmp_path / "parts").glob("*.arrow"))) == 2 + 3
    assert list(parts["row_id"]) == list(range(7)) and parts.column_names == whole.column_names
    for side in SIDES:
        np.testing.assert_allclose(np.stack(list(parts[side])), np.stack(list(whole[side])), rtol=0, atol=1e-6)


def test_an_interrupted_run_goes_on_with_the_next_part(tiny_pipeline, encoded, tmp_path, monkeypatch):
    monkeypatch.setattr(latents, "PART_ROWS", 3)
    pipe = tiny_pipeline("sd")
    calls, whole = Calls(pipe, monkeypatch), pipe.vae.encode

    def interrupted(stack: torch.Tensor) -> Any:
        if calls.pictures >= 1 + 2 * 4:  # in the middle of the second part
            raise KeyboardInterrupt
        return whole(stack)

    with monkeypatch.context() as patched:
        patched.setattr(pipe.vae, "encode", interrupted)
        with pytest.raises(KeyboardInterrupt):
            encoded(pipe, {"train": pairs(7, captions=CAPTIONS[:1])}, batch_size=1)
    parts = {path.name.rsplit("-", 1)[1] for path in (tmp_path / "cache").glob("*.arrow")}
    assert parts == {"00000.arrow"} and len(list((tmp_path / "cache").glob("*-00000.arrow"))) == 2
    calls.take()
    coded = encoded(pipe, {"train": pairs(7, captions=CAPTIONS[:1])}, batch_size=1)
    assert calls.take() == (2 * 4, [])
    batch = LatentCollator(coded, SIDES)([coded.sets["train"][place] for place in range(7)])
    for place, row in enumerate(pairs(7)):
        torch.testing.assert_close(batch["rejected"][place], moments_of(pipe, row["rejected"]), rtol=0, atol=1e-5)


# Faults


def test_a_picture_that_cannot_be_read_is_named_with_its_row(tiny_pipeline, encoded, tmp_path):
    rows = pairs(4).to_list()
    rows[2]["rejected"] = rows[2]["rejected"][:60]
    broken = Dataset.from_list(rows, features=pairs(1).features)
    with pytest.raises(UserError, match="^the image 'rejected' of the row with row_id 2 .*; take the row out of the"):
        encoded(tiny_pipeline("sd"), {"train": broken})
    assert len(list((tmp_path / "cache").glob("*.arrow"))) == 1  # the captions'


def test_a_folder_that_cannot_be_written_is_named(tiny_pipeline, encoded, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file/below cannot be written \(.*\); set image_cache_dir"):
        encoded(tiny_pipeline("sd"), folder=tmp_path / "file" / "below")


def test_a_pipeline_in_half_precision_is_encoded_and_kept(tiny_pipeline, encoded):
    whole = encoded(tiny_pipeline("sd")).sets["train"]
    pipe = tiny_pipeline("sd").to(torch.bfloat16)
    half = encoded(pipe)
    rows = half.sets["train"].with_format("numpy")["chosen"]
    np.testing.assert_allclose(rows, np.stack(list(whole["chosen"])), rtol=0, atol=0.05)
    with torch.no_grad():
        expected = family_of(pipe).conditions(pipe, ["digit seven"])["states"].float()
    found = half.conditions([half.texts.index("digit seven")])["states"]
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=0, atol=3e-8)
    assert str(half.captions.features["states"].feature.dtype) == "float16"
