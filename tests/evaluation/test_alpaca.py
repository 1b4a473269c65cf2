"""AlpacaEval's numbers: the published ones, and files that are broken in every way."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

from llmalign.cli import main
from llmalign.errors import UserError
from llmalign.evaluation.alpaca import compare, summarize
from llmalign.evaluation.annotations import read_annotations, write_json
from llmalign.evaluation.constants import instruction_index, load_constants
from tests.evaluation.annotated import CONSTANTS, FOLDER, MODELS, expected, lines, needs_files, row, slim


@needs_files
@pytest.mark.parametrize("model", MODELS)
def test_published_numbers(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows, wanted = slim(model), expected()[model]
    write_json(tmp_path / "annotations.json", rows)
    arguments = ["--constants", str(CONSTANTS), "--alignment", "position", "--json", str(tmp_path / "out.json")]
    assert main(["winrate", str(tmp_path / "annotations.json"), *arguments]) == 0
    found = json.loads((tmp_path / "out.json").read_text())
    for name in ("win_rate", "standard_error", "discrete_win_rate"):
        assert found[name] == pytest.approx(wanted[name], abs=1e-6)
    for name in ("n_wins", "n_wins_base", "n_draws", "n_total"):
        assert found[name] == wanted[name]
    assert found["length_controlled_winrate"] == pytest.approx(wanted["length_controlled_winrate"], abs=0.25)
    if wanted["lc_standard_error"] is not None:
        assert found["lc_standard_error"] == pytest.approx(wanted["lc_standard_error"], abs=0.02)
    assert found["n_rows"] == len(rows)


@needs_files
def test_alignment_by_instruction_mends_what_position_misplaces() -> None:
    constants, rows = load_constants(CONSTANTS), slim("text_davinci_001")
    by_instruction = summarize(rows, constants=constants)
    by_position = summarize(rows, constants=constants, alignment="position")
    assert by_instruction.length_controlled_winrate == pytest.approx(6.48, abs=0.25)
    assert by_position.length_controlled_winrate == pytest.approx(9.03, abs=0.25)
    assert any("by position" in warning for warning in by_position.warnings)
    assert not any("by position" in warning for warning in by_instruction.warnings)


@needs_files
def test_order_and_texts_do_not_matter_by_instruction() -> None:
    constants, rows = load_constants(CONSTANTS), slim("claude-2")
    shuffled = [rows[i] for i in np.random.default_rng(0).permutation(len(rows))]
    one, other = (summarize(r, constants=constants).length_controlled_winrate for r in (rows, shuffled))
    assert one == pytest.approx(other, abs=0.25)
    full = lines(FOLDER / "alpaca-7b.full.jsonl.gz")
    assert [instruction_index(r) for r in full] == list(range(805))
    texts = summarize(full, constants=constants)
    assert texts.length_controlled_winrate == pytest.approx(5.875, abs=0.25)


@needs_files
def test_rows_without_a_preference_are_said_and_the_rest_counts() -> None:
    constants, rows = load_constants(CONSTANTS), slim("vicuna-7b")
    for place, value in ((0, None), (1, -1), (2, math.nan), (3, 2.5)):
        rows[place] = {**rows[place], "preference": value}
    found = summarize(rows, constants=constants)
    kept = [r["preference"] - 1 for r in rows[4:]]
    assert found.n_rows == found.n_total == 801
    assert found.win_rate == pytest.approx(100 * np.mean(kept))
    assert found.length_controlled_winrate == pytest.approx(6.28, abs=0.5)
    said = next(warning for warning in found.warnings if "left out" in warning)
    assert said.startswith("4 of 805 rows") and all(kind in said for kind in ("null", "-1", "NaN", "outside"))


def test_definitions_by_hand() -> None:
    rows = [row(1.0, "a"), row(2, "b"), row(1.5, "c"), row(0, "d"), row(1.6, "e", dataset="x"), row(1.2, "f")]
    found = summarize(rows)
    wins = [0, 1, 0.5, 0.5, 0.6, 0.2]
    assert found.win_rate == pytest.approx(100 * sum(wins) / 6)
    assert found.standard_error == pytest.approx(100 * np.std(wins, ddof=1) / math.sqrt(6))
    assert (found.n_wins, found.n_wins_base, found.n_draws) == (2, 2, 2)
    assert found.discrete_win_rate == pytest.approx(100 * (0 + 1 + 0.5 + 0.5 + 1 + 0) / 6)
    assert found.avg_length == 4 and found.mode == "community"
    assert found.per_dataset == [{"dataset": "x", "n": 1, "win_rate": pytest.approx(60), "standard_error": None}]
    assert found.length_controlled_winrate is not None and found.lc_standard_error is None
    assert any("without difficulty" in warning for warning in found.warnings)


def test_repeated_instructions_are_said() -> None:
    found = summarize([row(2, "a"), row(1, "a"), row(2, "b")])
    assert found.n_rows == 3 and any("1 rows repeat" in warning for warning in found.warnings)


@pytest.mark.parametrize("rows", [[], [row(None)], [row(math.nan), row(-1)]])
def test_nothing_judged_is_none_and_said(rows: list) -> None:
    found = summarize(rows)
    assert found.win_rate is found.standard_error is found.length_controlled_winrate is None
    assert found.n_rows == 0 and any("no row with a preference" in warning for warning in found.warnings)
    json.dumps(found.as_dict(), allow_nan=False)


def test_one_row_has_no_error() -> None:
    found = summarize([row(2)])
    assert found.win_rate == 100 and found.standard_error is None
    assert any("one row" in warning for warning in found.warnings)
    json.dumps(found.as_dict(), allow_nan=False)


def test_the_baseline_itself_is_at_fifty() -> None:
    same = [{**row(1.5, str(i), generator_2="base"), "output_2": "xxxx"} for i in range(6)]
    found = summarize(same)
    assert found.length_controlled_winrate == 50 and any("both sides are called base" in w for w in found.warnings)


def test_two_models_of_one_name_are_no_baseline() -> None:
    rng = np.random.default_rng(0)
    rows = [
        row(2.0, str(i), (int(a), int(b)), generator_2="base") for i, (a, b) in enumerate(rng.integers(1, 9, (99, 2)))
    ]
    assert summarize(rows).length_controlled_winrate > 90


def test_instructions_known_by_number_alone_are_apart() -> None:
    rows = [{**row(1 + i % 2, "x"), "instruction": None, "instruction_id": i} for i in range(40)]
    found = summarize(rows)
    assert found.interval.high > found.interval.low and not any("repeat" in warning for warning in found.warnings)


def test_nan_is_written_as_null(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", [row(math.nan)])
    assert read_annotations(tmp_path / "a.json")[0]["preference"] is None


def test_several_models_in_one_file_are_refused() -> None:
    with pytest.raises(UserError, match="several models .*model, other.* generator_2"):
        summarize([row(1), row(1, generator_2="other")])


def test_paired_difference() -> None:
    rng = np.random.default_rng(1)
    hard = rng.uniform(1, 2, 200)
    one = [row(float(p), str(i)) for i, p in enumerate(hard)]
    other = [row(float(max(p - 0.1, 1)), str(i)) for i, p in enumerate(hard)][::-1]
    found = compare(one, other)
    assert found.n == 200 and found.mean == pytest.approx(100 * np.mean(hard - np.maximum(hard - 0.1, 1)))
    assert found.high - found.low < 2  # the prompts' own spread, 30 points, cancels
    with pytest.raises(UserError, match="share no judged instruction"):
        compare(one, [row(1, "elsewhere")])


@pytest.mark.parametrize(
    "text, said",
    [
        ("{", "is no JSON"),
        ("{}", "holds no list"),
        ("[1]", "row 0 of .* is no JSON object"),
        ('[{"instruction": "i"}]', "row 0 of .* has no 'output_1'"),
        ('[{"instruction": "i", "output_1": 3, "output_2": "", "preference": 1}]', "no text in 'output_1'"),
        ('[{"instruction": "i", "output_1": "", "output_2": "", "preference": "2"}]', "the preference '2'"),
        ('[{"instruction": "i", "output_1": "", "output_2": "", "preference": true}]', "the preference True"),
    ],
)
def test_broken_files_are_named(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(UserError, match=said):
        read_annotations(tmp_path / "a.json")


def test_exit_status_of_an_empty_file(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "a.json").write_text("[]")
    assert main(["winrate", str(tmp_path / "a.json"), "--json", str(tmp_path / "o.json"), "--no_constants"]) == 1
    assert "no row with a preference" in caplog.text
    assert json.loads((tmp_path / "o.json").read_text())["win_rate"] is None


def test_several_files(tmp_path: Path) -> None:
    for name, shift in (("one", 0.0), ("two", 0.3)):
        rows = [row(min(1 + 0.2 * (i % 4) + shift, 2), str(i), generator_2=name) for i in range(40)]
        write_json(tmp_path / f"{name}.json", rows)
    files = [str(tmp_path / "one.json"), str(tmp_path / "two.json")]
    board = tmp_path / "board.csv"
    board.write_text(",win_rate,length_controlled_winrate,note\nold,50.0,99.5,kept as it is\n")
    out = tmp_path / "o.json"
    assert main(["winrate", *files, "--no_constants", "--json", str(out), "--leaderboard", str(board)]) == 0
    found = json.loads(out.read_text())
    assert set(found["models"]) == {"one", "two"}
    assert found["differences"][0]["mean"] == pytest.approx(-30, abs=0.01)
    assert list(found["bradley_terry"]) == ["two", "base", "one"]
    text = board.read_text().splitlines()
    assert text[1].startswith("old,50.0,99.5,kept as it is") and {line.split(",")[0] for line in text[2:]} == {
        "one",
        "two",
    }
    assert main(["winrate", files[0], files[0], "--no_constants"]) == 2


@pytest.mark.parametrize("content, said", [("{}", "lack 'difficulty'"), ("[", "cannot be read")])
def test_broken_constants(tmp_path: Path, content: str, said: str) -> None:
    (tmp_path / "c.json").write_text(content)
    with pytest.raises(UserError, match=said):
        load_constants(tmp_path / "c.json")
    short = {"difficulty": [0.1], "gamed_std_delta_len": [1.0], "gamed_index": [0], "gamed_preference": [0.2]}
    (tmp_path / "c.json").write_text(json.dumps(short))
    with pytest.raises(UserError, match="not AlpacaEval's"):
        load_constants(tmp_path / "c.json")
