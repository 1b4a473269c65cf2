"""The sampler that a config asks for: the pipelines' own schedules, and what does not belong together."""

from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from llmalign.diffusion.pipelines import family_of
from llmalign.diffusion.samplers import SAMPLERS, build_sampler
from llmalign.errors import UserError

SHAPE = (4, 4, 4)


def built(pipe: Any, kind: str | None, steps: int, **options: Any) -> Any:
    return build_sampler(
        kind, dict(pipe.scheduler.config), steps, family=family_of(pipe), latent_shape=SHAPE, **options
    )


def own_timesteps(pipe: Any, steps: int, size: int = 8) -> list[float]:
    """Those of an ordinary call of the pipeline."""
    pipe("digit one", num_inference_steps=steps, height=size, width=size, output_type="latent")
    return pipe.scheduler.timesteps.tolist()


@pytest.mark.parametrize("kind", ["sd", "sd2", "sd3", "flux", "flux-schnell"])
def test_timesteps_are_the_pipelines_own(kind, tiny_pipeline):
    pipe = tiny_pipeline(kind)
    for steps in (4, 5):
        found = built(pipe, None, steps)
        assert found.timesteps.tolist() == pytest.approx(own_timesteps(pipe, steps), rel=1e-6)
        # A flow's last step adds noise, too, in Flow-GRPO's code.
        assert len(found) == steps and found.stochastic == list(range(steps))


def test_under_dynamic_shifting_the_shift_of_sd3_is_the_pipelines_own(tiny_pipeline):
    pipe = tiny_pipeline("sd3")
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, base_shift=0.3, max_shift=2.0)
    assert built(pipe, None, 5).timesteps.tolist() == pytest.approx(own_timesteps(pipe, 5), rel=1e-6)


def test_the_shift_of_flux_grows_with_the_image(tiny_pipeline):
    pipe = tiny_pipeline("flux")
    config = dict(pipe.scheduler.config)
    found = [
        build_sampler(None, config, 4, family=family_of(pipe), latent_shape=(4, side, side)).timesteps.tolist()
        for side in (4, 16)
    ]
    assert found[1] == pytest.approx(own_timesteps(pipe, 4, size=32), rel=1e-6)
    assert all(large > small for small, large in zip(found[0][1:], found[1][1:], strict=True))


def test_noise_as_told(tiny_pipeline):
    diffusion, flow = tiny_pipeline("sd"), tiny_pipeline("sd3")
    for pipe, option in ((diffusion, "eta"), (flow, "noise_level")):
        whole, half = (built(pipe, None, 4, **{option: value}) for value in (0.8, 0.4))
        torch.testing.assert_close(whole.std, 2 * half.std)
        assert built(pipe, None, 4, **{option: 0.0}).stochastic == []
    assert torch.equal(built(diffusion, None, 4).std, built(diffusion, None, 4, eta=1.0, noise_level=0.1).std)
    assert torch.equal(built(flow, None, 4).std, built(flow, None, 4, noise_level=0.7, eta=0.1).std)


def test_each_name_is_its_sampler(tiny_pipeline):
    pipe = tiny_pipeline("sd")
    assert built(pipe, "ddim", 4).timesteps.tolist() == [751, 501, 251, 1] == built(pipe, None, 4).timesteps.tolist()
    euler = built(pipe, "euler_ancestral", 4)
    assert euler.stochastic == [0, 1, 2] and euler.initial_scale > 4
    consistency = built(pipe, "consistency", 4)
    assert consistency.timesteps.tolist() == [999, 749, 499, 249]
    assert consistency.stochastic == [0, 1, 2] and consistency.initial_scale == 1
    flow = tiny_pipeline("sd3")
    assert torch.equal(built(flow, "flow_sde", 4).std, built(flow, None, 4).std)


@pytest.mark.parametrize("kind", SAMPLERS)
def test_samplers_of_the_other_kind_of_model_are_refused(kind, tiny_pipeline):
    wrong = "sd" if kind == "flow_sde" else "flux"
    right = "ddim, euler_ancestral or consistency" if wrong == "sd" else "flow_sde"
    with pytest.raises(UserError, match=f"sampler: {kind} does not belong to this pipeline's schedule; use {right}$"):
        built(tiny_pipeline(wrong), kind, 4)
