"""The official alpaca_eval, in an environment of its own, reads this project's files and gives the same numbers."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from llmalign.evaluation.alpaca import summarize
from llmalign.evaluation.annotations import write_json
from llmalign.evaluation.constants import load_constants
from llmalign.evaluation.leaderboard import COLUMNS, update_leaderboard
from tests.evaluation.annotated import CONSTANTS, needs_files, slim

# Constants come from a file: nothing is fetched from the Hub. The package looks difficulties up by position.
OFFICIAL = """
import gzip, json, sys
import pandas as pd
import alpaca_eval.metrics.glm_winrate as glm
from alpaca_eval import utils
constants = json.load(gzip.open(sys.argv[1]))
gamed = pd.DataFrame({
    "model": "gamed", "std_delta_len": constants["gamed_std_delta_len"], "index": constants["gamed_index"],
    "preference": constants["gamed_preference"], "not_gamed_baseline": False,
})
gamed["instruction_difficulty"] = [constants["difficulty"][index] for index in gamed["index"]]
gamed.to_csv(sys.argv[2], index=False)
glm.hf_hub_download = lambda **options: sys.argv[2]
annotations = utils.load_or_convert_to_dataframe(sys.argv[3])
found = glm.get_length_controlled_winrate(annotations, save_weights_dir=None)
found["leaderboard"] = pd.read_csv(sys.argv[4], index_col=0).loc[sys.argv[5], "win_rate"]
found["rows"] = len(annotations)
print(json.dumps(found, default=float))
"""


@pytest.fixture(scope="module")
def official(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("official") / "venv"
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    install = [folder / "bin" / "pip", "install", "-q", "alpaca_eval==0.6.6", "datasets<4", "setuptools<81"]
    done = subprocess.run(install, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"alpaca_eval cannot be installed here: {done.stderr.strip()[-300:]}")
    return folder / "bin" / "python"


@pytest.mark.slow
@needs_files
@pytest.mark.parametrize("model", ["vicuna-7b", "text_davinci_001", "claude-2"])
@pytest.mark.parametrize("failed", [0, 7])
def test_same_numbers(official: Path, tmp_path: Path, model: str, failed: int) -> None:
    rows = slim(model)
    for place in range(failed):  # as the rows are written that no judge could answer
        rows[10 * place]["preference"] = None
    summary = summarize(rows, constants=load_constants(CONSTANTS), alignment="position")
    annotations, board = tmp_path / "annotations.json", tmp_path / "leaderboard.csv"
    write_json(annotations, rows)
    update_leaderboard(board, {model: summary})
    done = subprocess.run(
        [official, "-c", OFFICIAL, CONSTANTS, tmp_path / "gamed.csv", annotations, board, model],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    ours = summary.as_dict()
    assert found["rows"] == len(rows) and found["n_total"] == ours["n_total"]
    for name in set(COLUMNS) & set(found) - {"length_controlled_winrate", "lc_standard_error"}:
        assert found[name] == pytest.approx(ours[name], abs=1e-9), name
    assert found["length_controlled_winrate"] == pytest.approx(ours["length_controlled_winrate"], abs=0.25)
    assert found["leaderboard"] == pytest.approx(ours["win_rate"], abs=1e-9)
