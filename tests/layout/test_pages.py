"""What the pages name exists: files, functions, configs, recipes."""

import importlib
import re
from pathlib import Path

import pytest

import llmalign

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted(
    path
    for path in (
        ROOT / "README.md",
        ROOT / "EVALUATION.md",
        ROOT / "RELIABILITY.md",
        *ROOT.glob("trainers/**/*.md"),
        *ROOT.glob("data/*.md"),
        *ROOT.glob("accelerate_configs/*.md"),
    )
)


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
        assert target.startswith("https://") or (page.parent / target).exists(), f"{page.name}: {target}"


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_named_objects_can_be_imported(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for name in set(re.findall(r"`llmalign\.([A-Z]\w+)`", text)):
        assert name in llmalign.__all__ and getattr(llmalign, name)
    for name in set(re.findall(r"`(?:llmalign\.)?losses\.(\w+)", text)) - {"pairwise", "grouped"}:
        assert callable(getattr(importlib.import_module("llmalign.losses"), name))


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_shipped_recipes_that_commands_name_are_there(page: Path) -> None:
    for recipe in re.findall(
        r"(?:llmalign train|scripts/train\.py) (trainers/\S+\.yaml)", page.read_text(encoding="utf-8")
    ):
        assert (ROOT / recipe).is_file()


def test_first_screen_shows_exactly_two_commands() -> None:
    screen = (ROOT / "README.md").read_text(encoding="utf-8").split("\n## ")[0]
    assert re.findall(r"^make (\S+)", screen, flags=re.MULTILINE) == ["quickstart", "test"]
    assert len(re.findall(r"^```$", screen, flags=re.MULTILINE)) == 2
