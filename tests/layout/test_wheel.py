"""A wheel is built and looked into: recipes and samples are inside, nothing else of the checkout is importable."""

import importlib.util
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from llmalign import assets
from llmalign.errors import UserError

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def wheel_names(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    if importlib.util.find_spec("setuptools") is None:
        pytest.skip("building a wheel needs setuptools, and it is not installed")
    folder = tmp_path_factory.mktemp("wheel")
    copy = folder / "checkout"
    parts = ("llmalign", "trainers", "data", "accelerate_configs", "pyproject.toml", "setup.py", "README.md", "LICENSE")
    copy.mkdir()
    for name in parts:
        # A copy, so that the build leaves nothing in the checkout.
        subprocess.run(["cp", "-r", str(ROOT / name), str(copy / name)], check=True)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index", "-q"]
    subprocess.run([*command, "-w", str(folder), str(copy)], check=True, capture_output=True, text=True)
    (wheel,) = folder.glob("*.whl")
    return zipfile.ZipFile(wheel).namelist()


def test_wheel_holds_every_asset(wheel_names: list[str]) -> None:
    shipped = [
        path.relative_to(ROOT)
        for folder in ("trainers", "data", "accelerate_configs")
        for path in (ROOT / folder).rglob("*")
        if path.suffix in {".yaml", ".md", ".jsonl", ".parquet"}
    ]
    assert len(shipped) > 20
    missing = [str(path) for path in shipped if f"llmalign/_assets/{path.as_posix()}" not in wheel_names]
    assert not missing


def test_wheel_has_one_importable_tree(wheel_names: list[str]) -> None:
    tops = {name.split("/")[0] for name in wheel_names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"llmalign"}


def test_wheel_holds_every_module(wheel_names: list[str]) -> None:
    modules = {path.relative_to(ROOT).as_posix() for path in (ROOT / "llmalign").rglob("*.py")}
    assert modules <= set(wheel_names)


def test_assets_resolve_in_a_checkout() -> None:
    assert assets.path("trainers/rpo/recipe.yaml") == ROOT / "trainers" / "rpo" / "recipe.yaml"


def test_assets_prefer_the_packaged_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "_assets" / "data").mkdir(parents=True)
    (tmp_path / "_assets" / "data" / "x.yaml").write_text("a: 1\n")
    monkeypatch.setattr(assets, "PACKAGE", tmp_path)
    assert assets.path("data/x.yaml") == tmp_path / "_assets" / "data" / "x.yaml"


def test_unknown_asset_is_named() -> None:
    with pytest.raises(UserError, match="data/absent.yaml is not shipped"):
        assets.path("data/absent.yaml")
