"""`llmalign pairs`: scored and judged answers made into pairs that the doctor and a trainer read as they are."""

import csv
import errno
import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from llmalign.cli import main
from llmalign.data.pair_files import PairOptions, write_pairs
from llmalign.data.specs import DataSource

Rows = list[dict[str, Any]]

GROUPS: Rows = [
    {"prompt": "One? ", "completions": ["good one", "bad", "so so"], "rewards": [2.0, -1.0, 0.5]},
    {"prompt": "Two? ", "completions": ["x", "y"], "rewards": [1.0, 1.0]},
    {"prompt": "Three? ", "completions": ["alone"], "rewards": [1.0]},
    {"prompt": "Four? ", "completions": ["p", " ", "quite long", "s"], "rewards": [0.25, 9.0, None, 0.5]},
    {"prompt": "Five? ", "completions": ["p", "q"], "rewards": None},
]
JUDGED: Rows = [
    {"instruction": "One? ", "output_1": "first", "output_2": "second", "preference": 1.0},
    {"instruction": "Two? ", "output_1": "first", "output_2": "second", "preference": 1.75},
    {"instruction": "Three? ", "output_1": "first", "output_2": "second", "preference": 1.5},
    {"instruction": "Four? ", "output_1": "first", "output_2": "second", "preference": None},
    {"instruction": "Five? ", "output_1": "same", "output_2": "same", "preference": 1.0},
    {"instruction": "Six? ", "output_1": "", "output_2": "second", "preference": 2},
    {"instruction": "Seven? ", "output_1": "first", "output_2": "second", "preference": -1},
    {"instruction": "Eight? ", "output_1": "first", "output_2": "second", "preference": 0},
]


def turns(*texts: str) -> Rows:
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


def _cell(value: Any) -> Any:
    return json.dumps(value) if isinstance(value, list) else value


def write(path: Path, rows: Rows) -> str:
    if path.name.endswith(".gz"):
        path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))
    elif path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif path.suffix == ".csv":
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            for row in rows:
                writer.writerow({key: _cell(value) for key, value in row.items()})
    else:
        text = json.dumps(rows) if path.suffix == ".json" else "".join(json.dumps(row) + "\n" for row in rows)
        path.write_text(text, encoding="utf-8")
    return str(path)


def read(path: Path) -> Rows:
    content = path.read_bytes()
    text = (gzip.decompress(content) if path.suffix == ".gz" else content).decode()
    return [json.loads(line) for line in text.splitlines()]


def table(said: str) -> dict[str, str]:
    cells = [line.strip("│").split("│") for line in said.splitlines() if line.startswith("│")]
    return {name.strip(): value.strip() for name, value in cells}


@pytest.fixture
def run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, Path]]:
    """Run the command on rows or a name; its status, what it said (on stderr where it failed), and where it wrote."""

    def run_pairs(rows: Rows | str, *options: str, name: str = "in.jsonl", out: str = "pairs.jsonl"):
        data = rows if isinstance(rows, str) else write(tmp_path / name, rows)
        status = main(["pairs", data, "--out", str(tmp_path / out), *options])
        printed = capsys.readouterr()
        assert "Traceback" not in printed.err
        if status:
            (sentence,) = [line for line in printed.err.splitlines() if line.startswith("llmalign: ")]
            return status, sentence, tmp_path / out
        return status, printed.out, tmp_path / out

    return run_pairs


@pytest.mark.parametrize("name", ["in.jsonl", "in.json", "in.jsonl.gz", "in.parquet", "in.csv"])
def test_groups_of_every_kind_of_file(run, name: str) -> None:
    status, said, out = run(GROUPS, name=name)
    assert status == 0 and "read as groups" in said
    expected = {"prompt": "One? ", "chosen": "good one", "rejected": "bad", "chosen_reward": 2.0}
    assert read(out) == [
        {**expected, "rejected_reward": -1.0, "margin": 3.0, "row_id": 0},
        {"prompt": "Four? ", "chosen": "s", "rejected": "p", "chosen_reward": 0.5, "rejected_reward": 0.25,
         "margin": 0.25, "row_id": 3},
    ]  # fmt: skip
    assert table(said) == {
        "prompts": "5",
        "prompts that gave a pair": "2",
        "pairs": "2",
        "dropped: pairs of equal rewards": "1",
        "dropped: prompts with fewer than two answers left": "2",
        "dropped: empty answers": "1",
        "dropped: answers without a finite reward": "3",
        "mean margin": "1.62",
        "pairs whose chosen answer is longer": "50.0%",
    }
    assert "Warning" not in said and f"--dataset_name {out}" in said and f"llmalign doctor {out}" in said


@pytest.mark.parametrize("name", ["in.json", "in.csv", "in.parquet"])
def test_comparisons_of_every_kind_of_file(run, name: str) -> None:
    status, said, out = run(JUDGED, name=name, out="deep/er/pairs.jsonl.gz")
    assert status == 0 and "read as comparisons" in said
    assert read(out) == [
        {"prompt": "One? ", "chosen": "first", "rejected": "second", "preference": 1.0, "margin": 1.0, "row_id": 0},
        {"prompt": "Two? ", "chosen": "second", "rejected": "first", "preference": 1.75, "margin": 0.5, "row_id": 1},
    ]
    assert {name: value for name, value in table(said).items() if name.startswith("dropped")} == {
        "dropped: comparisons without a preference in [1, 2]": "2",
        "dropped: pairs of equal rewards": "2",
        "dropped: pairs of the same answer": "1",
        "dropped: empty answers": "1",
    }
    assert [path.name for path in out.parent.iterdir()] == ["pairs.jsonl.gz"]  # nothing is left aside


def test_first_rows_may_be_the_unscored_ones(run) -> None:
    assert len(read(run(GROUPS[::-1])[2])) == 2
    assert len(read(run(JUDGED[3:] + JUDGED[:3], out="judged.jsonl")[2])) == 2


def test_own_names_and_rows(run) -> None:
    own = [{"q": row["instruction"], "a": {"x": row["output_1"], "y": row["output_2"]}, "p": row["preference"],
            "keep": index != 1} for index, row in enumerate(JUDGED)]  # fmt: skip
    columns = "{instruction: q, output_1: a.x, output_2: a.y, preference: p}"
    _, said, out = run(own, "--columns", columns, "--where", "{keep: true}", "--max_rows", "3")
    assert [row["row_id"] for row in read(out)] == [0] and table(said)["comparisons"] == "3"
    nested = [{"prompt": "Q ", "outputs": [{"t": "a", "r": 1.0}, {"t": "b", "r": None}, {"t": "c", "r": 3.0}]}]
    _, _, out = run(nested, "--columns", "{completions: outputs.t, rewards: outputs.r}", out="nested.jsonl")
    assert [(row["chosen"], row["rejected"]) for row in read(out)] == [("c", "a")]


def test_lists_of_csv_columns_with_empty_cells(run) -> None:
    rows = [
        {"prompt": "A ", "x": "one", "y": "two", "z": "three", "sx": 1.5, "sy": "", "sz": 2},
        {"prompt": "B ", "x": "one", "y": "two", "z": "three", "sx": "nan", "sy": 3, "sz": 2},
    ]
    columns = "{completions: [x, y, z], rewards: [sx, sy, sz]}"
    _, said, out = run(rows, "--columns", columns, name="in.csv")
    assert [(row["chosen"], row["rejected"]) for row in read(out)] == [("three", "one"), ("two", "three")]
    assert table(said)["dropped: answers without a finite reward"] == "2"


def test_answers_keep_their_places_when_an_empty_one_is_left_out(run) -> None:
    rows = [{"prompt": "A ", "completions": ["p", " ", "q", "p"], "rewards": [0, 9, 1, 2]}]
    (row,) = read(run(rows)[2])
    assert (row["chosen"], row["rejected"], row["rejected_reward"]) == ("p", "q", 1.0)


def test_conversations_with_their_prompt_inside(run) -> None:
    rows = [{"completions": [turns("Hi?", "a much longer one"), turns("Hi?", "b")], "rewards": [1, 2]}]
    (row,) = read(run(rows)[2])
    answer = [{"role": "assistant", "content": "b"}]
    assert row["prompt"] == turns("Hi?") and row["chosen"] == answer and row["margin"] == 1.0
    judged = [{"instruction": turns("Hi?"), "output_1": turns("Hi?", "a")[1:], "output_2": answer, "preference": 2.0}]
    assert read(run(judged, out="judged.jsonl")[2])[0]["chosen"] == answer


def test_a_row_has_the_same_pairs_wherever_it_stands(tmp_path: Path) -> None:
    rows = [
        {"prompt": f"Q{i} ", "completions": [f"{i} {k}" for k in range(5)], "rewards": [k * (i + 1) for k in range(5)]}
        for i in range(40)
    ]
    scored = write(tmp_path / "in.jsonl", rows)
    few = write(tmp_path / "few.jsonl", [row if i % 3 else rows[0] for i, row in enumerate(rows)])

    def made(data: str, name: str, seed: int, strategy: str = "all_pairs", **source: Any) -> Rows:
        limit = 3 if strategy == "all_pairs" else None
        options = PairOptions(strategy, max_pairs=limit, seed=seed)
        write_pairs(DataSource(data, **source), tmp_path / name, options=options)
        return read(tmp_path / name)

    whole = made(scored, "whole.jsonl", 0)
    assert len(whole) == 120
    part = made(few, "part.jsonl", 0)
    assert [row for row in part if row["row_id"] % 3] == [row for row in whole if row["row_id"] % 3]
    assert made(scored, "other.jsonl", 1) != whole
    made(scored, "again.jsonl", 0)
    assert (tmp_path / "again.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    drawn = made(scored, "a.jsonl.gz", 0, "best_random")
    assert (tmp_path / "a.jsonl.gz").read_bytes()[4:8] == bytes(4)  # no time, so the same pairs are the same bytes
    assert made(scored, "b.jsonl.gz", 0, "best_random", max_rows=7) == drawn[:7]
    assert len({row["rejected"][-1] for row in drawn}) == 4


def test_the_command_takes_a_seed(run) -> None:
    options = ["sample:groups", "--max_rows", "30", "--strategy", "best_random", "--overwrite"]
    zero, one, again = (run(*options, "--seed", seed)[2].read_bytes() for seed in ("0", "1", "0"))
    assert zero == again != one and run(*options)[2].read_bytes() == zero


@pytest.mark.parametrize(
    ("rows", "options", "words"),
    [
        (GROUPS, ["--margin", "4"], "in.jsonl gives no pair (rows: 5; answers without a finite reward: 3; "),
        (GROUPS, ["--margin", "4"], "pairs of equal rewards: 1; empty answers: 1): lower --margin."),
        ([GROUPS[1]], [], "(rows: 1; pairs of equal rewards: 1): use a reward or a judge that tells"),
        ([GROUPS[2]], [], "answers left: 1): give every prompt two or more scored answers"),
        ([GROUPS[4]], [], "prompts with fewer than two answers left: 1): score the answers first"),
        ([JUDGED[3]], [], "(rows: 1; comparisons without a preference in [1, 2]: 1): judge the answers first"),
        ([JUDGED[4]], [], "pairs of the same answer: 1): sample more varied answers"),
        ([JUDGED[5]], [], "empty answers: 1): sample answers that say something"),
        (GROUPS, ["--margin", "-1"], "margin must be zero or a positive finite number, got -1.0"),
        (JUDGED, ["--margin", "2"], "confidence and must be in [0, 1], got 2.0"),
        (JUDGED, ["--strategy", "best_worst"], "--strategy and --max_pairs_per_prompt are for groups"),
        (GROUPS, ["--strategy", "best_wurst"], "'best_wurst' is no strategy; known are: best_worst"),
        (GROUPS, ["--max_pairs_per_prompt", "2"], "is for all_pairs"),
        (GROUPS, ["--stratgy", "all_pairs"], "pairs has no option --stratgy; the nearest is --strategy"),
        (GROUPS, ["--max_truncated", "1"], "pairs has no option --max_truncated; the nearest is --max_"),
        (GROUPS, ["--kind", "comparisons"], "in.jsonl, line 1: has no 'instruction'; it has: prompt, completions"),
        (JUDGED, ["--columns", "{output1: a}"], "unknown key 'output1' (did you mean 'output_1'?)"),
        ([{"prompt": "a", "answer": "b"}], [], "line 1 has neither 'completions' and 'rewards' nor 'output_1'"),
        ([{"prompt": "a", "chosen": "b", "rejected": "c"}], [], "is a preference pair already"),
        ([GROUPS[0] | JUDGED[0]], [], "say which with --kind"),
        ([GROUPS[0], GROUPS[1] | {"rewards": [1.0]}], [], "in.jsonl, line 2: has 2 completions and 1 rewards"),
        ([GROUPS[0], GROUPS[1] | {"rewards": [1.0, "x"]}], [], "line 2: 'rewards[1]' must be a number or null"),
        ([JUDGED[0], JUDGED[1] | {"preference": "m"}], [], "line 2: 'preference' must be a number or null"),
        ([JUDGED[0], JUDGED[1] | {"output_2": 3}], [], "line 2: 'output_2' must be text"),
        (
            [{"instruction": turns("a"), "output_1": turns("a", "b"), "output_2": turns("a", "c"), "preference": 1}],
            [], "line 1: repeats the whole 'instruction' in 'output_1', which must hold the answer alone",
        ),
        (
            [{"instruction": turns("a", "b"), "output_1": turns("c"), "output_2": turns("d"), "preference": 1}],
            [], "'output_1' ends with a message of the role 'user'",
        ),
        ([], [], "in.jsonl is empty"),
        ("absent.jsonl", [], "There is no file or folder absent.jsonl"),
    ],
)  # fmt: skip
def test_faults_are_named_in_a_sentence(run, rows: Rows | str, options: list[str], words: str) -> None:
    status, sentence, out = run(rows, *options, out="new/pairs.jsonl")
    assert status == 2 and words in sentence and sentence.endswith(".")
    assert not out.parent.exists()


def test_what_is_there_is_replaced_only_on_request(run, tmp_path: Path) -> None:
    _, _, out = run(GROUPS)
    first = out.read_bytes()
    status, sentence, _ = run(JUDGED, name="judged.jsonl")
    assert status == 2 and "is there already; give --overwrite" in sentence and out.read_bytes() == first
    status, sentence, _ = run([GROUPS[1]], "--overwrite", name="tied.jsonl")
    assert status == 2 and out.read_bytes() == first  # nothing to replace it with
    assert run(JUDGED, "--overwrite", name="judged.jsonl")[0] == 0 and out.read_bytes() != first
    status, sentence, _ = run(str(tmp_path / "in.jsonl"), "--overwrite", out="in.jsonl")
    assert status == 2 and "is the file that is read" in sentence
    (tmp_path / "folder.jsonl").mkdir()
    for name, words in (("pairs.csv", ".jsonl or .jsonl.gz"), ("in.jsonl/a.jsonl", "cannot be written"),
                        ("folder.jsonl", "is a folder")):  # fmt: skip
        status, sentence, _ = run(GROUPS, out=name, name="again.jsonl")
        assert status == 2 and words in sentence


def test_a_disk_that_is_full_leaves_nothing_behind(run, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("llmalign.data.pair_files.os.replace", full)
    status, sentence, out = run(GROUPS, out="new/pairs.jsonl")
    assert status == 2 and sentence.endswith("new/pairs.jsonl cannot be written: No space left on device.")
    assert list(out.parent.iterdir()) == []


def test_a_length_bias_is_said(run) -> None:
    rows = [{"prompt": f"Q{i} ", "completions": ["long" * (i + 1), "x"], "rewards": [1, 0]} for i in range(8)]
    rows += [{"prompt": f"R{i} ", "completions": ["y", "long"], "rewards": [1, 0]} for i in range(3)]
    assert "Warning: the chosen answer is the longer one in 72.7% of the pairs" in run(rows)[1]
    assert "Warning" not in run(rows[1:], "--overwrite")[1]  # 7 of 10 is not more than .7


def test_doctor_and_trainer_read_the_pairs_as_they_are(
    run, tmp_path: Path, tiny_model_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, _, out = run("sample:groups", "--max_rows", "24", out="pairs.jsonl.gz")
    assert main(["doctor", str(out), "--model", str(tiny_model_dir)]) == 0
    assert "24 rows of pairs" in capsys.readouterr().out
    command = ["train", "trainers/rpo/smoke.yaml", "--dataset_name", str(out), "--max_steps", "1"]
    command += ["--model_name_or_path", str(tiny_model_dir), "--alarm_prompts", "0"]
    assert main([*command, "--output_dir", str(tmp_path / "run")]) == 0
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["data"]["train"]["rows"] == 24


def test_real_judgements(run, shared: Path) -> None:
    """Of 805 comparisons three are of an answer with itself."""
    data = shared / "datasets" / "alpaca_eval" / "alpaca-7b.full.jsonl.gz"
    _, said, out = run(str(data))
    assert len(read(out)) == 802 and table(said)["dropped: pairs of the same answer"] == "3"
    judged = read(data)
    for row in read(out):
        source = judged[row["row_id"]]
        better, worse = ("output_1", "output_2") if source["preference"] < 1.5 else ("output_2", "output_1")
        assert (row["prompt"], row["chosen"], row["rejected"]) == (source["instruction"], source[better], source[worse])
    assert "Warning: the chosen answer is the longer one in 96.5% of the pairs" in said


def test_real_scores(run, shared: Path) -> None:
    data = str(shared / "datasets" / "preference" / "alpaca_eval_listwise8.jsonl.gz")
    columns = ["--columns", "{completions: outputs.output, rewards: outputs.score}", "--max_rows", "100"]
    _, _, out = run(data, *columns, "--margin", "0.2")
    groups = [row["outputs"] for row in read(Path(data))[:100]]
    spread = {i: max(o["score"] for o in own) - min(o["score"] for o in own) for i, own in enumerate(groups)}
    assert [row["row_id"] for row in read(out)] == [i for i, gap in spread.items() if gap >= 0.2]
    assert all(row["margin"] == spread[row["row_id"]] for row in read(out))
