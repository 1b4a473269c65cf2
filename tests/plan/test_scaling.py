"""The page of scaling on paper is what its script prints."""

from pathlib import Path

import pytest

from llmalign.plan import paper


@pytest.fixture
def written(repository: Path) -> str:
    return (repository / "accelerate_configs" / "SCALING.md").read_text(encoding="utf-8")


def test_the_page_has_the_shapes_and_their_models(written: str) -> None:
    for line in paper.shapes():
        assert line + "\n" in written
    for shape in paper.SHAPES:
        for way in paper.WAYS:
            assert f"| {way} |" in written and f"| {shape.name} |" in written
    assert written.startswith(paper.HEAD)


@pytest.mark.parametrize("name, numbers", [("7B", 6_738_415_616), ("8B", 8_030_261_248), ("70B", 70_553_706_496)])
def test_shapes_have_the_numbers_of_the_released_models(name: str, numbers: int) -> None:
    """As counted by those who made them."""
    shape = next(shape for shape in paper.SHAPES if shape.name == name)
    assert shape.outline(paper.FULL).weights().count == numbers


@pytest.mark.slow
def test_the_page_is_what_the_script_prints(written: str) -> None:
    assert paper.page() == written
