"""A recipe is data: nothing in it is run while it is read."""

from pathlib import Path

import pytest

from llmalign.cli import main
from llmalign.data.specs import read_spec
from llmalign.errors import UserError
from llmalign.methods import METHODS
from llmalign.recipe import load_recipe

CODE = (
    "!!python/object/apply:os.system ['touch it-ran']",
    "!!python/object/new:os.system ['touch it-ran']",
    "!!python/name:os.system",
    "!!python/module:subprocess",
    "!!python/object/apply:subprocess.check_output [[touch, it-ran]]",
)


@pytest.mark.parametrize("code", CODE)
@pytest.mark.parametrize("where", ["{}", "method: rpo\noutput_dir: {}", "method: rpo\ncolumns: {{prompt: {}}}"])
def test_python_in_a_recipe_is_refused_and_never_run(code, where, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipe.yaml").write_text(where.format(code))
    assert main(["train", "recipe.yaml"]) == 2
    assert "not valid YAML" in capsys.readouterr().err
    assert not (tmp_path / "it-ran").exists()


@pytest.mark.parametrize("code", CODE)
def test_python_in_an_override_is_text(code, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="beta"):
        load_recipe("trainers/rpo/smoke.yaml", ["--beta", code])
    assert not (tmp_path / "it-ran").exists()


def test_python_in_a_data_spec_is_refused(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "spec.yaml").write_text(f"path: {CODE[0]}")
    with pytest.raises(UserError):
        read_spec(str(tmp_path / "spec.yaml"))
    assert not (tmp_path / "it-ran").exists()


@pytest.mark.parametrize("method", [name for name, found in METHODS.items() if not found.of_images])
def test_code_beside_a_model_is_off_unless_set(method: str) -> None:
    assert METHODS[method].config.trust_remote_code is False
