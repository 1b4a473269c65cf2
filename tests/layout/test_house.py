"""The folders exist, each with its reason; data folders hold no code; files and functions stay small."""

import ast
import subprocess
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = (
    "losses", "scores", "trainers", "diffusion", "data", "rewards", "evaluation", "embedded", "cli", "judges", "loop",
    "report", "hub", "export", "plan",
)  # fmt: skip
FOLDERS = ("trainers", "data", "data/samples", "accelerate_configs", "scripts", "tests")
FILES = ("pyproject.toml", "README.md", "Makefile", "constraints.txt", "LICENSE", ".ci/run")
CODE = sorted(path for folder in ("llmalign", "scripts") for path in (ROOT / folder).rglob("*.py"))
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60


@pytest.mark.parametrize("name", PACKAGES)
def test_every_package_says_why_it_exists(name: str) -> None:
    source = (ROOT / "llmalign" / name / "__init__.py").read_text(encoding="utf-8")
    docstring = ast.get_docstring(ast.parse(source))
    assert docstring and len(docstring.split()) >= 5


@pytest.mark.parametrize("name", FOLDERS)
def test_folder_exists(name: str) -> None:
    assert (ROOT / name).is_dir()


@pytest.mark.parametrize("name", FILES)
def test_file_exists(name: str) -> None:
    assert (ROOT / name).stat().st_size > 0


@pytest.mark.parametrize("folder", ["trainers", "data", "accelerate_configs"])
def test_asset_folders_hold_no_code(folder: str) -> None:
    assert not list((ROOT / folder).rglob("*.py"))


@pytest.mark.parametrize("path", CODE, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_and_functions_are_small(path: Path) -> None:
    source = path.read_text(encoding="utf-8")
    assert source.count("\n") <= MAX_FILE_LINES
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            assert length <= MAX_FUNCTION_LINES, f"{path.name}:{node.lineno} {node.name} has {length} lines"


def test_no_unfinished_marks() -> None:
    marks = ("TO" + "DO", "FIX" + "ME", "X" + "XX")
    found = [
        f"{path.relative_to(ROOT)}: {mark}"
        for path in CODE
        for mark in marks
        if mark in path.read_text(encoding="utf-8")
    ]
    assert not found


def test_make_knows_every_command_that_the_readme_names() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in ("setup", "quickstart", "test", "test-all", "lint", "claims", "bench"):
        assert f"\n{target}: " in makefile


def test_one_lowest_python_everywhere() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    lowest = project["project"]["requires-python"].removeprefix(">=")
    assert project["tool"]["ruff"]["target-version"] == f"py{lowest.replace('.', '')}"
    assert project["tool"]["mypy"]["python_version"] == lowest
    for name in ("README.md", "Makefile"):
        assert f"Python {lowest} or newer" in (ROOT / name).read_text(encoding="utf-8"), name


def test_ci_script_is_executable_and_parses() -> None:
    script = ROOT / ".ci" / "run"
    assert script.stat().st_mode & 0o111
    subprocess.run(["bash", "-n", str(script)], check=True)


def test_no_script_hides_a_library() -> None:
    """A script's folder comes first on the path of everything that it imports."""
    names = {path.stem for path in (ROOT / "scripts").glob("*.py")} | {
        path.name for path in (ROOT / "scripts").iterdir() if (path / "__init__.py").is_file()
    }
    libraries = {"accelerate", "datasets", "evaluate", "peft", "torch", "transformers", "trl", "diffusers", "gguf"}
    assert not names & libraries
