"""A path that a data set names is not followed: nothing outside the data set's own files is read."""

import json
from pathlib import Path

import datasets
import pyarrow
import pytest
from datasets import Dataset, DatasetDict

from llmalign.data.formats import load
from llmalign.data.readers import open_shards
from llmalign.data.specs import DataSource
from llmalign.errors import UserError

ROW = {"prompt": "a", "chosen": "b", "rejected": "c"}
SECRET = "what nobody may see"


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    path = tmp_path / "outside" / "secret.png"
    path.parent.mkdir()
    path.write_text(SECRET)
    return path


@pytest.fixture
def saved(tmp_path: Path, secret: Path) -> Path:
    """A saved data set with images that are paths to a file elsewhere, as `datasets` itself would never write them."""
    folder = tmp_path / "saved"
    image = {"bytes": None, "path": str(secret)}
    text, file = datasets.Value("string"), {"bytes": datasets.Value("binary"), "path": datasets.Value("string")}
    features = datasets.Features({**dict.fromkeys(ROW, text), "image": file, "more": datasets.List(file)})
    rows = Dataset.from_list([{**ROW, "image": image, "more": [image]}] * 2, features=features)
    rows.save_to_disk(folder)
    info = json.loads((folder / "dataset_info.json").read_text())
    info["features"]["image"] = {"_type": "Image"}
    info["features"]["more"] = {"feature": {"_type": "Image"}, "_type": "List"}
    (folder / "dataset_info.json").write_text(json.dumps(info))
    arrow = next(folder.glob("*.arrow"))
    metadata = {"huggingface": json.dumps({"info": {"features": info["features"]}})}
    table = rows.data.table.replace_schema_metadata(metadata)
    with pyarrow.OSFile(str(arrow), "wb") as sink, pyarrow.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return folder


def test_datasets_itself_would_follow_it(saved: Path) -> None:
    with pytest.raises(Exception, match="cannot identify image"):  # it has opened the file, which is no image
        list(datasets.load_from_disk(str(saved)))


def test_images_of_a_saved_data_set_are_not_opened(saved: Path, secret: Path) -> None:
    (shard,) = open_shards(DataSource(path=str(saved)), streaming=False)
    found = [row for _, row in shard.rows()]
    assert found[0]["image"] == {"bytes": None, "path": str(secret)} == found[0]["more"][0]
    assert SECRET not in json.dumps(found)
    source = {"path": str(saved), "columns": {name: name for name in ROW}}
    assert load(source, kind="pairs")["chosen"][:] == ["b", "b"]


@pytest.mark.parametrize("name", ["../outside/rows.arrow", "/outside/rows.arrow", "a/b.arrow", 3])
def test_a_saved_data_set_reads_only_files_beside_it(name, tmp_path: Path) -> None:
    Dataset.from_list([ROW] * 2).save_to_disk(tmp_path / "outside")
    next((tmp_path / "outside").glob("*.arrow")).rename(tmp_path / "outside" / "rows.arrow")
    Dataset.from_list([ROW]).save_to_disk(tmp_path / "saved")
    state = tmp_path / "saved" / "state.json"
    content = json.loads(state.read_text())
    content["_data_files"] = [{"filename": name}]
    state.write_text(json.dumps(content))
    with pytest.raises(UserError, match="only files beside it are read"):
        load(str(tmp_path / "saved"), kind="pairs")


@pytest.mark.parametrize("name", ["../outside", "/outside", "a/b", 3])
def test_a_saved_data_set_reads_only_splits_beside_its_index(name, tmp_path: Path) -> None:
    DatasetDict({"train": Dataset.from_list([ROW])}).save_to_disk(tmp_path / "saved")
    (tmp_path / "saved" / "dataset_dict.json").write_text(json.dumps({"splits": ["train", name]}))
    with pytest.raises(UserError, match="only folders beside it are read"):
        load(str(tmp_path / "saved"), kind="pairs")


@pytest.mark.parametrize("what", ["file", "folder"])
def test_a_link_in_a_saved_data_set_is_not_followed(what, tmp_path: Path) -> None:
    DatasetDict({"train": Dataset.from_list([ROW])}).save_to_disk(tmp_path / "saved")
    linked = tmp_path / "saved" / "train"
    if what == "file":
        linked = next(linked.glob("*.arrow"))
    linked.rename(tmp_path / "outside")
    linked.symlink_to(tmp_path / "outside")
    with pytest.raises(UserError, match="is a link to what lies outside"):
        load(str(tmp_path / "saved"), kind="pairs")


def test_text_that_is_a_path_stays_text(secret: Path, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"prompt": f"file://{secret}", "chosen": str(secret), "rejected": "../outside"}) + "\n")
    (found,) = load(str(rows), kind="pairs")
    assert found["chosen"] == str(secret) and found["prompt"] == f"file://{secret}"
