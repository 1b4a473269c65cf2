"""The methods that a recipe can name, of text and of images; what an image method needs is loaded when it is used."""

from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from typing import Any, TypeAlias

from llmalign import trainers


@dataclass(frozen=True)
class ImageMethod:
    """As `trainers.Method`, for the rows of images that `kind` names; `module` holds the trainer and its config.

    diffusers takes seconds to import and is an extra, so both are looked up when they are first asked for, which raises
    UserError where it is not installed.
    """

    name: str
    module: str
    trainer_name: str
    config_name: str
    kind: str
    of_images = True

    @cached_property
    def trainer(self) -> Any:
        """The trainer's class."""
        return getattr(self._loaded, self.trainer_name)

    @cached_property
    def config(self) -> Any:
        """The config's class."""
        return getattr(self._loaded, self.config_name)

    @property
    def _loaded(self) -> Any:
        return import_module(f"llmalign.diffusion.{self.module}")


Method: TypeAlias = trainers.Method | ImageMethod

METHODS: dict[str, Method] = {
    **trainers.METHODS,
    **{
        method.name: method
        for method in (
            ImageMethod(
                "diffusion_dpo", "trainer", "DiffusionPreferenceTrainer", "DiffusionPreferenceConfig", "image_pairs"
            ),
            ImageMethod("seppo", "seppo", "SePPOTrainer", "SePPOConfig", "images"),
            ImageMethod("pso_offline", "pso", "PSOOfflineTrainer", "PSOOfflineConfig", "image_pairs"),
            ImageMethod("d3po", "online", "D3POTrainer", "D3POConfig", "captions"),
            ImageMethod("pso", "online", "PSOTrainer", "PSOConfig", "captions"),
        )
    },
}
