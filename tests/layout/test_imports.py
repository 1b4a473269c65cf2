"""Which way imports run (DESIGN of the house), read from the source, so that nothing has to be imported."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "llmalign"
SOURCES = sorted(PACKAGE.rglob("*.py"))

# What each part of the package may import from the package; parts of one folder may always import each other.
LEAVES = {"errors", "types"}
LIBRARY = {"losses", "scores", "data", "rewards", "judges"}
MAY_IMPORT = {
    "errors": set(),
    "types": set(),
    "losses": {"types"},
    "scores": {"types", "errors"},
    "data": {"errors", "assets", "types"},
    "judges": {"errors", "types"},
    "rewards": {"errors", "pickles", "types", "scores", "losses", "judges"},
    "embedded": {"errors", "assets"},
    "assets": {"errors"},
    "values": {"errors", "secrets"},
    "secrets": set(),
    "refusals": {"errors"},
    "processes": {"errors"},
    "pickles": {"errors"},
    "sigterm": set(),
    "deepspeed_ops": {"errors"},
    "launch": {"errors", "assets", "sigterm", "deepspeed_ops"},
    "launched": {"errors"},
    "inference": LEAVES | {"assets", "embedded", "pickles", "trainers"},
    "evaluation": {"errors", "types", "losses", "scores", "data", "judges"},
    "report": LEAVES | {"evaluation", "secrets"},
    "hub": LEAVES | {"assets", "secrets"},
    "export": LEAVES | {"inference", "scores"},
    "chat": LEAVES | {"inference", "scores"},
    "evaluate": LEAVES | LIBRARY | {"assets", "evaluation", "inference", "trainers"},
    "trainers": LEAVES | LIBRARY | {"assets", "evaluation", "pickles", "processes", "secrets", "sigterm"},
    "diffusion": LEAVES | {"assets", "pickles", "processes", "losses", "data", "rewards", "trainers"},
    "methods": LEAVES | {"diffusion", "trainers"},
    "recipe": LEAVES | {"assets", "values", "data", "methods", "refusals", "trainers"},
    "prepare": LEAVES | {"data", "recipe", "trainers"},
    "work": LEAVES | {"prepare", "recipe", "refusals"},
    "image_work": LEAVES | {"data", "diffusion", "prepare", "recipe", "rewards", "trainers", "work"},
    "train": LEAVES
    | LIBRARY
    | {
        "prepare",
        "processes",
        "recipe",
        "refusals",
        "trainers",
        "embedded",
        "evaluation",
        "image_work",
        "launched",
        "sigterm",
        "work",
    },
    "verify": LEAVES | {"hub", "trainers"},
    "plan": LEAVES
    | {"scores", "data", "recipe", "prepare", "image_work", "refusals", "train", "trainers", "diffusion"},
    "fill": LEAVES | {"data", "prepare", "recipe", "train", "trainers"},
    "loop": LEAVES | LIBRARY | {"assets", "evaluation", "prepare", "recipe", "train", "trainers"},
    "sweep": LEAVES | {"evaluation", "recipe", "train", "trainers"},
    "screen": set(),
    "quickstart_images": LEAVES | {"rewards", "diffusion", "embedded", "evaluation", "screen"},
    "quickstart": LEAVES
    | LIBRARY
    | {"prepare", "recipe", "train", "trainers", "embedded", "evaluation", "assets", "screen"},
}


def imports_of(path: Path) -> set[str]:
    """Dotted names of every module that a file imports, anywhere in it."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import; write it in full"
            names |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module or ""}
    return names


def part_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def own_parts(names: set[str]) -> set[str]:
    parts = {name.split(".")[1] for name in names if name.startswith("llmalign.")}
    return {part for part in parts if (PACKAGE / part).is_dir() or (PACKAGE / f"{part}.py").is_file()}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_run_one_way(path: Path) -> None:
    part = part_of(path)
    if part in {"__init__", "cli"}:
        return  # the two ends: __init__ re-exports lazily, cli may import everything
    assert part in MAY_IMPORT, f"{part} is new: say in this test what it may import"
    wrong = own_parts(imports_of(path)) - MAY_IMPORT[part] - {part}
    assert not wrong, f"{path.relative_to(ROOT)} imports llmalign.{sorted(wrong)[0]}"


@pytest.mark.parametrize("library, home", [("trl", "trainers"), ("diffusers", "diffusion")])
def test_library_stays_in_its_folder(library: str, home: str) -> None:
    users = {part_of(path) for path in SOURCES for name in imports_of(path) if name.split(".")[0] == library}
    assert users <= {home}


def test_losses_import_torch_and_types_alone() -> None:
    names = {name for path in (PACKAGE / "losses").rglob("*.py") for name in imports_of(path)}
    roots = {name.split(".")[0] for name in names} - {"llmalign"}
    assert roots <= {"torch", "math", "collections", "typing", "__future__", "dataclasses"}


def test_private_names_of_trl_are_touched_in_one_file() -> None:
    def private(path: Path) -> bool:
        return any(
            name.split(".")[0] == "trl" and any(word.startswith("_") for word in name.split("."))
            for name in imports_of(path)
        )

    assert {path.name for path in SOURCES if private(path)} <= {"_trl.py"}


def test_the_rules_would_notice(tmp_path: Path) -> None:
    bad = tmp_path / "bad.py"
    bad.write_text("import torch\n\ndef f():\n    from llmalign.trainers import METHODS\n    return METHODS\n")
    assert own_parts(imports_of(bad)) == {"trainers"}
