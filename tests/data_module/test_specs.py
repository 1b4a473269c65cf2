"""Data sources and the shipped specs."""

from pathlib import Path

import pytest
import yaml

from llmalign.data.formats import DataSource, load, parse_sources, read_spec
from llmalign.data.images import PAIRS, load_image_rows
from llmalign.data.rows import KINDS
from llmalign.errors import UserError


def test_a_name_a_mapping_and_a_list():
    assert parse_sources("a.jsonl") == [DataSource("a.jsonl")]
    assert parse_sources({"path": "a.jsonl", "max_rows": 3}) == [DataSource("a.jsonl", max_rows=3)]
    both = parse_sources([{"path": "a.jsonl", "weight": 3}, {"path": "b/c", "weight": 1, "split": "test"}])
    assert both == [DataSource("a.jsonl", weight=3), DataSource("b/c", weight=1, split="test")]


@pytest.mark.parametrize(
    "value, words",
    [
        ({"path": "a", "colums": {}}, "'colums' (did you mean 'columns'?)"),
        ({"split": "train"}, "no `path`"),
        ({"path": ""}, "`path`"),
        ({"path": 3}, "`path`"),
        (7, "got 7"),
        ([], "empty"),
        ({"path": "a", "weight": 0}, "`weight` of a"),
        ({"path": "a", "weight": float("nan")}, "`weight` of a"),
        ({"path": "a", "weight": True}, "`weight` of a"),
        ({"path": "a", "max_rows": 0}, "`max_rows` of a"),
        ({"path": "a", "max_rows": 2.5}, "`max_rows` of a"),
        ({"path": "a", "split": 1}, "`split` of a"),
        ({"path": "a", "columns": ["chosen"]}, "`columns` of a"),
        ({"path": "a", "columns": {"chosen": 3}}, "'chosen': 3"),
        ({"path": "a", "columns": {"chosen": []}}, "'chosen': []"),
        ({"path": "a", "where": "split"}, "`where` of a"),
        ([{"path": "a", "weight": 1}, "b"], "b has no `weight`"),
        ("spec:ultrafedback_binarized", "did you mean 'ultrafeedback_binarized'?"),
    ],
)
def test_a_faulty_source_gets_one_sentence(value, words):
    with pytest.raises(UserError) as caught:
        parse_sources(value)
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_a_spec_is_read_and_what_stands_beside_it_wins():
    (source,) = parse_sources({"path": "spec:dpo_mix_7k", "split": "test", "max_rows": 5})
    assert source.path == "argilla/dpo-mix-7k" and source.split == "test" and source.max_rows == 5
    assert source.columns == {"chosen": "chosen", "rejected": "rejected"} and len(source.revision) == 40


SPECS = sorted(path.stem for path in (Path(__file__).parents[2] / "data").glob("*.yaml"))


@pytest.mark.parametrize("name", SPECS)
def test_every_shipped_spec_can_be_used(name):
    spec = read_spec(name)
    assert spec["about"] and spec["licence"]
    (source,) = parse_sources(f"spec:{name}")
    assert set(source.columns or {}) <= {column for columns in KINDS.values() for column in columns}
    if not source.path.startswith("sample:"):
        assert source.revision is not None and source.path.count("/") == 1


def test_the_readme_lists_every_spec(repository):
    text = (repository / "data" / "README.md").read_text(encoding="utf-8")
    assert SPECS and all(f"`{name}`" in text for name in SPECS)


@pytest.mark.parametrize("name, kind", [("sample_pairs", "pairs"), ("sample_groups", "groups"), ("sample_sft", "text")])
def test_the_samples_load(name, kind):
    train = load(f"spec:{name}", kind=kind)
    test = load({"path": f"spec:{name}", "where": {"split": "test"}}, kind=kind)
    assert len(train) >= 100 and len(test) >= 40
    assert not set(train["row_id"]) & set(test["row_id"])


def test_the_samples_of_images_load():
    train = load_image_rows("spec:sample_image_pairs", kind=PAIRS)
    test = load_image_rows({"path": "spec:sample_image_pairs", "where": {"split": "test"}}, kind=PAIRS)
    assert (len(train), len(test)) == (36, 18) and set(train["caption"]) == set(test["caption"])
    assert not set(train["row_id"]) & set(test["row_id"])


@pytest.mark.parametrize(
    "text, words",
    [
        ("source: a/b\nlicense: MIT\n", "'license' (did you mean 'licence'?)"),
        ("source: a/b\n", "licence"),
        ("- a\n", "must be a mapping"),
        ("source: [\n", "not valid YAML"),
        ("source: !!python/object/apply:os.getcwd []\nlicence: MIT\n", "not valid YAML"),
    ],
)
def test_a_faulty_spec_gets_one_sentence(tmp_path, monkeypatch, text, words):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "mine.yaml").write_text(text, encoding="utf-8")
    monkeypatch.setattr("llmalign.assets.root", lambda: tmp_path)
    with pytest.raises(UserError) as caught:
        read_spec("mine")
    assert words in str(caught.value) and "data/mine.yaml" in str(caught.value)


def test_specs_say_what_they_say_in_yaml(repository):
    listwise = yaml.safe_load((repository / "data" / "ultrafeedback_groups.yaml").read_text(encoding="utf-8"))
    assert listwise["columns"]["rewards"] == "completions.overall_score"
