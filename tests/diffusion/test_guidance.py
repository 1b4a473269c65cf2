"""Adaptive guidance: the rule row by row on a network whose cosines are chosen, and plain pipelines as references."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline

from llmalign.diffusion.guidance import Savings, adaptive_guidance, similarity
from llmalign.errors import UserError

Pipelines = Callable[[str], Any]
PROMPTS = ("digit one", "red green blue", "a small picture of the digit seven")
STACKED = ("sd", "sd2", "sdxl", "sd3")


def network_of(pipe: Any) -> Any:
    return pipe.transformer if "transformer" in pipe.components else pipe.unet


def draw(
    pipe: Any, prompts: tuple[str, ...] = PROMPTS, *, steps: int = 8, first: int = 0, **options: Any
) -> torch.Tensor:
    generators = [torch.Generator().manual_seed(first + place) for place in range(len(prompts))]
    options = {"guidance_scale": 4.0, "output_type": "latent", **options}
    return pipe(list(prompts), num_inference_steps=steps, height=8, width=8, generator=generators, **options).images


def cosines(pipe: Any, **options: Any) -> torch.Tensor:
    """gamma (steps, N) of plain guidance, from the network's own outputs."""
    found = []

    def record(module: Any, inputs: Any, output: tuple[torch.Tensor]) -> None:
        u, c = output[0].flatten(1).chunk(2)
        found.append((u * c).sum(1) / (u.norm(dim=1) * c.norm(dim=1)))

    handle = network_of(pipe).register_forward_hook(record)
    draw(pipe, **options)
    handle.remove()
    return torch.stack(found)


class Scripted:
    """In place of a UNet's forward: row n has eps_c = e0 and, at step s, eps_u at the cosine `table[n][s]` to it."""

    def __init__(self, table: list[list[float]]) -> None:
        self.table, self.asked, self.step = table, [], 0

    def __call__(self, sample: torch.Tensor, timestep: Any, *, encoder_hidden_states: torch.Tensor, **_: Any) -> tuple:
        marks = [round(float(row[0, 0])) for row in encoder_hidden_states]  # n + 1: with its prompt, -(n + 1): without
        self.asked.append(marks)
        output = torch.zeros_like(sample)
        for row, mark in enumerate(marks):
            cosine = 1.0 if mark > 0 else self.table[-mark - 1][self.step]
            output[row, 0, 0, 0], output[row, 0, 0, 1] = cosine, math.sqrt(1 - cosine**2)
        self.step += 1
        return (output,)

    def run(self, pipe: Any, *, guidance: float = 3.0) -> list[torch.Tensor]:
        """What the scheduler is given at each step, (N, 2): along eps_c and across."""
        given = []
        step = pipe.scheduler.step

        def spy(prediction: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            given.append(prediction[:, 0, 0, :2].clone())
            return step(prediction, *args, **kwargs)

        pipe.unet.forward, pipe.scheduler.step, self.step, self.asked = self, spy, 0, []
        marks = torch.arange(1.0, len(self.table) + 1)[:, None, None].expand(-1, 8, 16)
        with adaptive_guidance(pipe) as savings:
            pipe(
                prompt_embeds=marks,
                negative_prompt_embeds=-marks,
                num_inference_steps=len(self.table[0]),
                guidance_scale=guidance,
                output_type="latent",
            )
        self.savings = savings
        del pipe.unet.forward, pipe.scheduler.step
        return given


def test_rule_on_chosen_cosines(tiny_pipeline: Pipelines) -> None:
    """The step that reaches .991 still combines; later ones do without, even where gamma would have fallen again."""
    table = [
        [0.5, 0.9, 0.995, 0.2, 0.2],
        [0.992, 0.1, 0.1, 0.1, 0.1],
        [0.1, 0.99, 0.98, 0.99, 0.9],
        [0.1, 0.2, 0.3, 0.4, 0.9999],
    ]
    scripted = Scripted(table)
    given = scripted.run(tiny_pipeline("sd"), guidance=3.0)
    prompted = [1, 2, 3, 4]
    assert scripted.asked == [
        [-1, -2, -3, -4, *prompted],
        [-1, -3, -4, *prompted],
        [-1, -3, -4, *prompted],
        [-3, -4, *prompted],
        [-3, -4, *prompted],
    ]
    last_guided = [2, 0, 4, 4]
    for step, prediction in enumerate(given):
        for row, last in enumerate(last_guided):
            cosine = table[row][step]
            wanted = (1.0, 0.0)
            if step <= last:  # u + 3 (c - u) = 3 c - 2 u
                wanted = (3 - 2 * cosine, -2 * math.sqrt(1 - cosine**2))
            assert prediction[row].tolist() == pytest.approx(wanted, abs=1e-5), (step, row)
    assert scripted.savings == Savings(conditional=20, unconditional=14, images=4, at_once=1)
    assert scripted.savings.unconditional_share == pytest.approx(0.3)
    assert scripted.savings.share == pytest.approx(0.15)
    said = scripted.savings.text()
    assert "30.0% of the unconditional passes, 15.0% of all network" in said and "1 of 4 images" in said


def test_oracle() -> None:
    oracle = json.loads((Path(__file__).parents[1] / "data" / "image-losses.json").read_text())["adaptive_guidance"]

    def seq(count: int, k: float) -> torch.Tensor:
        return torch.tensor([round(math.sin(k * (place + 1)), 6) for place in range(count)], dtype=torch.float64)

    gamma = similarity(
        seq(24, 0.9).reshape(3, 2, 4), torch.stack([seq(8, k) for k in (0.9, 0.93, 1.4)]).reshape(3, 2, 4)
    )
    # The conditional rows go on where the one before ended; row 0 is that of the first unconditional one.
    assert gamma.dtype == torch.float64
    assert gamma.tolist() == pytest.approx(oracle["gamma"], rel=1e-12)
    assert (gamma < oracle["threshold"]).tolist() == oracle["use_cfg"]


def test_similarity_of_half_precision_is_computed_in_single() -> None:
    c = torch.full((1, 4, 64, 64), 8.0, dtype=torch.float16)  # its squares sum to 1 048 576: infinite in half precision
    u = c.clone()
    u[0, :2] = 0
    assert similarity(c, u).item() == pytest.approx(math.sqrt(0.5), rel=1e-6)


@pytest.mark.parametrize("kind", STACKED)
def test_a_threshold_above_one_is_plain_guidance(kind: str, tiny_pipeline: Pipelines) -> None:
    pipe = tiny_pipeline(kind)
    plain = draw(pipe)
    with adaptive_guidance(pipe, threshold=1.01) as savings:
        assert torch.equal(draw(pipe), plain)
    assert savings == Savings(conditional=24, unconditional=24, images=3)
    assert savings.share == 0 and "images" not in savings.text()


@pytest.mark.parametrize("kind", STACKED)
def test_rows_of_a_batch_are_told_apart(kind: str, tiny_pipeline: Pipelines) -> None:
    """Each image of a batch is what it is alone, and the batch saves what they save together."""
    pipe = tiny_pipeline(kind)
    plain, gammas = draw(pipe), cosines(pipe)
    # Reached by the three images at different steps, or never.
    reached = sorted(float(gammas[:, row].max()) for row in range(3))
    threshold = (reached[0] + reached[1]) / 2
    with adaptive_guidance(pipe, threshold=threshold) as together:
        batch = draw(pipe)
    alone = []
    for row, prompt in enumerate(PROMPTS):
        with adaptive_guidance(pipe, threshold=threshold) as savings:
            image = draw(pipe, (prompt,), first=row)
        alone.append(savings)
        torch.testing.assert_close(batch[row : row + 1], image, rtol=1e-4, atol=1e-4)
        changed = float((image - plain[row : row + 1]).abs().max())
        assert (changed > 1e-4) == (savings.unconditional < 8), (kind, row, changed)
    assert together.unconditional == sum(savings.unconditional for savings in alone)
    assert len({savings.unconditional for savings in alone}) > 1


def test_a_share_of_the_steps_ends_guidance_as_the_pipelines_own_callback_does(tiny_pipeline: Pipelines) -> None:
    pipe = tiny_pipeline("sd")

    def end_after_three(pipe: Any, step: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        if step == 2:
            pipe._guidance_scale = 1.0
            values["prompt_embeds"] = values["prompt_embeds"].chunk(2)[1]
        return values

    inputs = ["prompt_embeds"]
    wanted = draw(pipe, callback_on_step_end=end_after_three, callback_on_step_end_tensor_inputs=inputs)
    with adaptive_guidance(pipe, threshold=1.01, max_cfg_fraction=0.4) as savings:  # .4 of 8 steps: 3.2
        torch.testing.assert_close(draw(pipe), wanted, rtol=1e-4, atol=1e-5)
    assert savings.unconditional == 9
    assert float((wanted - draw(pipe)).abs().max()) > 1e-3


def test_without_guidance_rescaled_guidance_is_none(tiny_pipeline: Pipelines) -> None:
    pipe = tiny_pipeline("sd2")
    with adaptive_guidance(pipe, threshold=1.01, max_cfg_fraction=0.5):
        rescaled, as_it_is = draw(pipe, steps=1, guidance_rescale=0.7), draw(pipe, steps=1)
    torch.testing.assert_close(rescaled, as_it_is)
    assert float((draw(pipe, steps=1, guidance_rescale=0.7) - as_it_is).abs().max()) > 1e-3


def test_every_call_starts_anew_even_after_one_that_failed(tiny_pipeline: Pipelines) -> None:
    pipe = tiny_pipeline("sd")

    def fail(pipe: Any, step: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        raise KeyError("stopped")

    with adaptive_guidance(pipe, threshold=1e-3) as savings:
        first = draw(pipe)
        with pytest.raises(KeyError):
            draw(pipe, callback_on_step_end=fail)
        assert savings == Savings(conditional=27, unconditional=6, images=6, at_once=6)
        assert torch.equal(draw(pipe), first)
        draw(pipe, PROMPTS[:1])
    assert savings == Savings(conditional=27 + 24 + 8, unconditional=10, images=10, at_once=10)


@pytest.mark.parametrize("offloaded", [False, True])
def test_network_is_restored_after_an_error(tiny_pipeline: Pipelines, offloaded: bool) -> None:
    pipe = tiny_pipeline("sd")
    own = pipe.unet.forward
    if offloaded:  # what accelerate's hooks do to a module

        def hooked(*args: Any, **kwargs: Any) -> Any:
            return own(*args, **kwargs)

        pipe.unet.forward = hooked
    plain = draw(pipe)
    with pytest.raises(KeyError), adaptive_guidance(pipe, threshold=0.5):
        assert not torch.equal(draw(pipe), plain)
        raise KeyError("stopped")
    assert vars(pipe.unet).get("forward") is (hooked if offloaded else None)
    assert torch.equal(draw(pipe), plain)


def test_per_row_inputs_are_found_inside_dicts_and_lists(tiny_pipeline: Pipelines) -> None:
    """Image prompts come as a list in a dict; whatever has no row for each image is passed on as it is."""
    pipe, seen = tiny_pipeline("sd"), []

    def forward(sample: torch.Tensor, timestep: Any, **inputs: Any) -> tuple[torch.Tensor]:
        seen.append((sample.flatten(), timestep, inputs))
        return (torch.ones_like(sample),)

    pipe.unet.forward = forward
    rows = torch.arange(4.0)
    inputs = {"added": {"embeds": [rows, (rows,)], "one": torch.ones(1)}, "mask": None, "scale": 0.5}
    pipe._guidance_scale, pipe._num_timesteps = 2.0, 2
    with adaptive_guidance(pipe):
        for _ in range(2):
            pipe.unet(rows.reshape(4, 1, 1, 1), torch.tensor(7), **inputs)
    sample, timestep, kept = seen[1]
    assert sample.tolist() == [2, 3] and timestep == 7
    (embeds, (nested,)), one = kept["added"]["embeds"], kept["added"]["one"]
    assert embeds.tolist() == nested.tolist() == [2, 3] and one.shape == (1,)
    assert (kept["mask"], kept["scale"]) == (None, 0.5)


@pytest.mark.parametrize("kind", ["flux", "flux-schnell"])
def test_flux_has_nothing_to_leave_out(kind: str, tiny_pipeline: Pipelines) -> None:
    pipe = tiny_pipeline(kind)
    with pytest.raises(UserError, match="FluxPipeline does not"), adaptive_guidance(pipe):
        pass
    assert "forward" not in vars(pipe.transformer)


def test_pipelines_that_call_the_network_twice_are_refused() -> None:
    """Their two passes look like halves of a batch where there are two images."""
    with pytest.raises(UserError, match="SimpleNamespace does not"), adaptive_guidance(SimpleNamespace()):
        pass


@pytest.mark.parametrize("kind", ["sd", "sd3"])
def test_guidance_that_is_off_is_refused(kind: str, tiny_pipeline: Pipelines) -> None:
    pipe = tiny_pipeline(kind)
    with adaptive_guidance(pipe), pytest.raises(UserError, match="Guidance is off .guidance_scale 1,"):
        draw(pipe, guidance_scale=1.0)


def test_skipped_layers_are_refused(tiny_pipeline: Pipelines) -> None:
    pipe: DiffusionPipeline = tiny_pipeline("sd3")
    with adaptive_guidance(pipe), pytest.raises(UserError, match="skip_guidance_layers"):
        draw(pipe, skip_guidance_layers=[0], skip_layer_guidance_start=0.0, skip_layer_guidance_stop=1.0)


@pytest.mark.parametrize("threshold", [0.0, -1.0, math.nan, math.inf])
def test_thresholds_that_cannot_be(tiny_pipeline: Pipelines, threshold: float) -> None:
    with pytest.raises(UserError, match="cosine above 0"), adaptive_guidance(tiny_pipeline("sd"), threshold=threshold):
        pass


@pytest.mark.parametrize("fraction", [0.0, -0.5, 1.5, math.nan])
def test_fractions_that_cannot_be(tiny_pipeline: Pipelines, fraction: float) -> None:
    with pytest.raises(UserError, match="share of the steps"):
        with adaptive_guidance(tiny_pipeline("sd"), max_cfg_fraction=fraction):
            pass


def test_a_second_time_at_once_is_an_error(tiny_pipeline: Pipelines) -> None:
    pipe = tiny_pipeline("sd")
    with adaptive_guidance(pipe):
        with pytest.raises(RuntimeError, match="already"), adaptive_guidance(pipe):
            pass
        assert "forward" in vars(pipe.unet)
    assert "forward" not in vars(pipe.unet)
