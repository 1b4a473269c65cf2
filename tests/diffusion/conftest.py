"""Tiny pipelines of every architecture, built and saved once a session."""

import gc
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest
from diffusers import DiffusionPipeline

from llmalign.diffusion.tiny import build_tiny


@pytest.fixture(scope="module", autouse=True)
def _little_garbage() -> Iterator[None]:
    """Every training collects garbage: what libraries and earlier tests made, most of it, is left out of that."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of the tiny pipeline of a kind; read it, do not write into it."""

    @cache
    def folder(kind: str) -> Path:
        path = tmp_path_factory.mktemp(f"tiny-{kind}")
        build_tiny(kind).save_pretrained(path)
        return path

    return folder


@pytest.fixture(scope="session")
def tiny_pipeline(tiny_folder: Callable[[str], Path]) -> Callable[[str], DiffusionPipeline]:
    """A fresh copy of the tiny pipeline of a kind, in evaluation mode, without progress bars."""

    def load(kind: str) -> DiffusionPipeline:
        pipe = DiffusionPipeline.from_pretrained(tiny_folder(kind))
        pipe.set_progress_bar_config(disable=True)
        return pipe

    return load
