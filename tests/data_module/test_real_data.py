"""The doctor on real preference sets; skipped where they are absent."""

import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from llmalign.data.doctor import drop_overlong, examine, refuse
from llmalign.data.formats import load
from llmalign.errors import UserError
from llmalign.trainers import prepare_groups, prepare_pairs

COLUMNS = {"completions": "outputs.output", "rewards": "outputs.score"}


@pytest.fixture(scope="module")
def stories(shared):
    return AutoTokenizer.from_pretrained(shared / "models" / "stories260K")


def preference(shared: Path, name: str) -> str:
    return str(shared / "datasets" / "preference" / f"{name}.jsonl.gz")


def examined(raw, prepared, tokenizer, max_length, kind="pairs"):
    return examine(raw, prepared, tokenizer, kind=kind, max_length=max_length, eos_ids=[tokenizer.eos_token_id])


@pytest.mark.slow
@pytest.mark.parametrize(
    "split, rows, fitting",
    [("test", 1680, 372), ("train", 11200, 2393)],
)
def test_alpaca_pairs_at_512_are_refused_and_those_that_fit_are_kept(shared, stories, split, rows, fitting):
    raw = load({"path": preference(shared, "alpaca_eval_pairs"), "where": {"split": split}}, kind="pairs")
    prepared = prepare_pairs(raw, stories, max_length=512)
    report = examined(raw, prepared, stories, 512)
    assert report.rows == rows and report.share("truncated") > 0.5
    with pytest.raises(UserError, match="`max_truncated` allows 5.0%"):
        refuse(report)
    kept = drop_overlong(prepared, 512, "pairs")
    assert len(kept) == fitting
    raw_kept = raw.filter(set(kept["row_id"][:]).__contains__, input_columns=["row_id"])
    refuse(examined(raw_kept, kept, stories, 512))


def test_listwise_outputs_are_groups(shared, stories):
    source = {"path": preference(shared, "alpaca_eval_listwise8"), "columns": COLUMNS}
    raw = load({**source, "max_rows": 60}, kind="groups")
    assert all(len(row["completions"]) == len(row["rewards"]) == 8 for row in raw)
    prepared = prepare_groups(raw, stories, max_length=512)
    with pytest.raises(UserError, match="`max_truncated`"):
        refuse(examined(raw, prepared, stories, 512, "groups"))
    kept = drop_overlong(prepared, 512, "groups")
    assert 0 < len(kept) < len(raw) and all(2 <= len(row["rewards"]) <= 8 for row in kept)
    refuse(examined(kept, kept, stories, 512, "groups"))


@pytest.mark.slow
def test_all_listwise_groups_that_fit(shared, stories):
    raw = load({"path": preference(shared, "alpaca_eval_listwise8"), "columns": COLUMNS}, kind="groups")
    assert len(raw) == 805
    kept = drop_overlong(prepare_groups(raw, stories, max_length=512), 512, "groups")
    assert len(kept) == 587 and sum(map(len, kept["rewards"][:])) == 2790


@pytest.mark.parametrize(
    "name, rows", [("hh_helpful_base_test_conv", 2348), ("human_pairs_mixed_conv", 1255)]
)  # fmt: skip
def test_conversations_are_healthy_under_a_chat_template(shared, chatml, name, rows):
    whole = load(preference(shared, name), kind="pairs")
    assert len(whole) == rows
    raw = whole.select(range(150))
    report = examined(raw, prepare_pairs(raw, chatml, max_length=8192), chatml, 8192)
    assert report.problems() == []
    for fault in ("missing_eos", "doubled_eos", "not_prefix", "empty", "identical"):
        assert report.findings[fault].count == 0


def test_a_truncated_copy_of_a_real_file_names_it(shared, tmp_path):
    whole = Path(preference(shared, "human_pairs_mixed_conv")).read_bytes()
    (tmp_path / "cut.jsonl.gz").write_bytes(whole[: len(whole) * 2 // 3])
    with pytest.raises(UserError, match="cut.jsonl.gz is a truncated or damaged gzip file"):
        load(str(tmp_path / "cut.jsonl.gz"), kind="pairs")


def test_the_two_halves_of_alpaca_pairs_share_no_prompt(shared):
    path = preference(shared, "alpaca_eval_pairs")
    train, test = (load({"path": path, "where": {"split": split}}, kind="pairs") for split in ("train", "test"))
    assert not set(train["prompt"][:]) & set(test["prompt"][:])
    assert not set(train["row_id"][:]) & set(test["row_id"][:])
    assert json.dumps(train[0]) != json.dumps(test[0])
