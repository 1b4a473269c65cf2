"""What must not go: paths, secrets and models that nobody can load; and what a push or a pull must not replace."""

import errno
import json
import logging
import os
from pathlib import Path
from typing import Any

import pytest

from llmalign.cli import main
from llmalign.errors import UserError
from llmalign.hub.card import write_card
from llmalign.hub.cleaning import cleaned, cleaned_config
from llmalign.hub.publish import DOWNLOADS, PULLED, _check_free, _said
from llmalign.hub.staging import MANIFEST, MARK, kind_of, stage


def write(folder: Path, **files: Any) -> Path:
    """A folder with files, named with __ for a dot and ___ for a slash; JSON unless it is text or bytes."""
    for name, content in files.items():
        path = folder / name.replace("___", "/").replace("__", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        data = content if isinstance(content, bytes | str) else json.dumps(content)
        path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return folder


@pytest.fixture
def model(tmp_path: Path) -> Path:
    config = {"architectures": ["LlamaForCausalLM"]}
    return write(tmp_path / "run", config__json=config, model__safetensors=b"weights")


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    place = tmp_path / "home" / "Jane Doe"
    place.mkdir(parents=True)
    monkeypatch.setenv("HOME", str(place))
    return place


def dry_run(run: Path, out: Path) -> int:
    return main(["push", str(run), "--repo", "me/x", "--dry-run", "--out", str(out)])


def test_a_dry_run_replaces_a_dry_run_alone(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert dry_run(model, model) == dry_run(model, model.parent) == 2
    assert "is the run or a folder above it" in capsys.readouterr().err
    pulled = write(tmp_path / "pulled", model__safetensors=b"theirs")
    write(pulled, **{MANIFEST.replace(".", "__"): {"files": {}}})
    assert dry_run(model, pulled) == 2 and (pulled / "model.safetensors").read_bytes() == b"theirs"
    out = tmp_path / "o"
    assert dry_run(model, out) == dry_run(model, out) == 0 and (out / MARK).is_file()
    assert MARK not in json.loads((out / MANIFEST).read_text())["files"]
    (out / "notes.txt").write_text("mine")
    capsys.readouterr()
    assert dry_run(model, out) == 2 and "holds notes.txt, which no dry run wrote" in capsys.readouterr().err
    assert (out / "notes.txt").is_file() and not list(tmp_path.glob(".hub-*"))


def test_a_dry_run_shares_no_bytes_with_the_run(model: Path, tmp_path: Path) -> None:
    stage(model, tmp_path / "o", "card")
    assert not os.path.samefile(tmp_path / "o" / "model.safetensors", model / "model.safetensors")
    stage(model, tmp_path / "linked", "card", link=True)
    assert os.path.samefile(tmp_path / "linked" / "model.safetensors", model / "model.safetensors")


def test_what_fails_leaves_the_earlier_one(model: Path, tmp_path: Path) -> None:
    stage(model, tmp_path / "o", "card")
    (model / "metrics.json").write_text('{"steps": ')
    with pytest.raises(UserError, match="metrics.json is no JSON .* half-written"):
        stage(model, tmp_path / "o", "other")
    assert (tmp_path / "o" / "README.md").read_text() == "card"


@pytest.mark.parametrize(
    "dirty, clean",
    [
        ({"next": "llmalign sample /a/b", "output_dir": "x", "data": {"train": {"frequent_captions": ["a"]}}},
         {"data": {"train": {}}}),
        ({"data": {"/home/me/p.jsonl": 1, "/home/you/p.jsonl": 2}}, {"data": {"p.jsonl": 1, "p.jsonl (2)": 2}}),
        (["/home/me/my data/p.jsonl", "C:\\Users\\me\\p.jsonl", "file:///home/me/p.jsonl"], ["p.jsonl"] * 3),
        ("row 3 of /home/me/p.jsonl: empty; see ~/notes.md", "row 3 of p.jsonl: empty; see notes.md"),
        (["--x=/home/me/p", "a / b /c", "and/or", "org/name", "../a/b", "7/8"],
         ["--x=p", "a / b /c", "and/or", "org/name", "../a/b", "7/8"]),
        (["http://u:pw@h/v1/x", "https://h/v1?api_key=abc&n=1"],
         ["http://h/v1/x", "https://h/v1?api_key=(not shown)&n=1"]),
        ({"Authorization": "Bearer x", "accessToken": "x", "pad_token": "<p>", "max_tokens": 3},
         {"pad_token": "<p>", "max_tokens": 3}),
        ("seen hf_ABCDEFGHIJKLMNOPQRST in it", "seen (not shown) in it"),
    ],
)  # fmt: skip
def test_records(dirty: Any, clean: Any) -> None:
    assert cleaned(dirty) == clean


def test_configurations() -> None:
    kept = {
        "eos_token": "</s>", "pad_token": "/home/x/pad", "unk_token": {"content": "/a/b"}, "image_token": "<image>",
        "chat_template": "{{ '/a/b' }}", "id2label": {"0": "/m/09x0r"}, "use_auth_token": False, "eos_token_id": 2,
        "added_tokens_decoder": {"0": {"content": "</a/b>"}}, "auto_map": {"AutoModel": "org/x--m.M"},
    }  # fmt: skip
    assert cleaned_config(kept) == kept
    dirty = {
        "tokenizer_file": "/home/me/tokenizer.json", "special_tokens_map_file": "/c/special_tokens_map.json",
        "init_kwargs": {"name_or_path": "/home/me/base", "token": "hf_x"}, "text_config": {"_name_or_path": "/m"},
        "use_auth_token": "hf_x", "_name_or_path": "org/name", "list": ["/home/me/one two"],
    }  # fmt: skip
    assert cleaned_config(dirty) == {
        "tokenizer_file": "tokenizer.json", "special_tokens_map_file": "special_tokens_map.json",
        "init_kwargs": {"name_or_path": "base"}, "text_config": {"_name_or_path": "m"}, "_name_or_path": "org/name",
        "list": ["one two"],
    }  # fmt: skip


def test_a_clean_configuration_keeps_its_bytes(model: Path, tmp_path: Path) -> None:
    write(model, tokenizer_config__json='{"eos_token":"</s>"}', generation_config__json={"_name_or_path": "/a/b"})
    staged = stage(model, tmp_path / "o", "card")
    assert (staged.folder / "tokenizer_config.json").read_text() == '{"eos_token":"</s>"}'
    assert json.loads((staged.folder / "generation_config.json").read_text()) == {"_name_or_path": "b"}


def test_what_cleaning_missed_is_refused(
    model: Path, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(model, tokenizer__json={"vocab": {str(home): 0}}, metrics__json={"a": f"read from {home}/p.jsonl twice"})
    write(model, evaluation___leaderboard__csv=f"name,rate\r\n{home}/m,1.5\r\n")
    staged = stage(model, tmp_path / "o", "card")
    assert json.loads((staged.folder / "metrics.json").read_text()) == {"a": "read from p.jsonl twice"}
    assert (staged.folder / "evaluation" / "leaderboard.csv").read_bytes() == b"name,rate\r\nm,1.5\r\n"
    write(model, tokenizer_config__json={"added_tokens_decoder": {"0": {"content": f"<{home}>"}}})
    with pytest.raises(UserError, match=r"tokenizer_config.json holds a path .*key added_tokens_decoder.0.content"):
        stage(model, tmp_path / "o", "card")
    (model / "tokenizer_config.json").unlink()
    with pytest.raises(UserError, match=r"README.md holds a path of this machine, .*line 2"):
        stage(model, tmp_path / "o", f"card\nof {model}")
    monkeypatch.setenv("HF_TOKEN", "secret-of-mine")
    write(model, chat_template__jinja="{{ 'secret-of-mine' }}")
    with pytest.raises(UserError, match="chat_template.jinja holds the token") as error:
        stage(model, tmp_path / "o", "card")
    assert "secret-of-mine" not in str(error.value)


@pytest.mark.parametrize("base", ["/home/me/base", "./base", "embedded:tiny", "a/b/c", "runs/sft", "two words"])
def test_a_base_that_is_no_hub_name(model: Path, tmp_path: Path, base: str) -> None:
    for call in (lambda: stage(model, tmp_path / "o", "card", base=base), lambda: write_card(model, "me/x", base=base)):
        with pytest.raises(UserError, match="--base .* is no name on the Hub"):
            call()


@pytest.mark.parametrize("base, warned", [("embedded:tiny", True), ("/home/me/base", True), ("gpt2", False)])
def test_an_adapter_that_nobody_can_load(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, base: str, warned: bool
) -> None:
    config = {"base_model_name_or_path": base, "task_type": "CAUSAL_LM"}
    run = write(tmp_path / "lora", adapter_config__json=config, adapter_model__safetensors=b"w")
    with caplog.at_level(logging.WARNING):
        stage(run, tmp_path / "o", "card")
    assert ("--base names it" in caplog.text) == warned
    caplog.clear()
    stage(run, tmp_path / "o", "card", base="org/base")
    assert not caplog.text
    stage(write(tmp_path / "image", pytorch_lora_weights__safetensors=b"w"), tmp_path / "o", "card")
    assert "nothing here tells the base" in caplog.text


@pytest.mark.parametrize("code, warned", [("modeling_x.X", True), ("org/x--modeling_x.X", False)])
def test_code_of_its_own(
    model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, code: str, warned: bool
) -> None:
    write(model, config__json={"auto_map": {"AutoModel": code}})
    with caplog.at_level(logging.WARNING):
        stage(model, tmp_path / "o", "card")
    assert ("code files that it names do not go" in caplog.text) == warned


def test_each_component_has_its_weights(tmp_path: Path) -> None:
    index = {"_class_name": "P", "unet": ["d", "U"], "text_encoder": ["t", "T"], "safety_checker": [None, None]}
    run = write(tmp_path / "p", model_index__json=index, text_encoder___pytorch_model__bin=b"w")
    write(run, unet___diffusion_pytorch_model__safetensors=b"w", text_encoder___config__json={})
    with pytest.raises(UserError, match="text_encoder are pickles \\(pytorch_model.bin\\)"):
        stage(run, tmp_path / "o", "card")
    write(run, text_encoder___model__safetensors=b"w")
    assert "text_encoder/model.safetensors" in stage(run, tmp_path / "o", "card").files


def test_links_are_followed(model: Path, tmp_path: Path) -> None:
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    for path in model.iterdir():
        (snapshot / path.name).symlink_to(path)
    for link in (False, True):
        staged = stage(snapshot, tmp_path / f"o{link}", "card", link=link)
        weights = staged.folder / "model.safetensors"
        assert weights.read_bytes() == b"weights" and not weights.is_symlink()
    (snapshot / "tokenizer.json").symlink_to(tmp_path / "gone")
    with pytest.raises(UserError, match="tokenizer.json of .* is a link that leads to nothing"):
        stage(snapshot, tmp_path / "o", "card")


def test_a_checkpoint_without_a_number(tmp_path: Path) -> None:
    write(tmp_path / "run", **{"checkpoint-best___x": "", "checkpoint-9___x": "", "checkpoint-10___x": ""})
    with pytest.raises(UserError, match="checkpoint-10"):
        kind_of(tmp_path / "run")
    write(tmp_path / "best", **{"checkpoint-best___x": ""})
    with pytest.raises(UserError, match="holds no model"):
        kind_of(tmp_path / "best")


def test_the_card_of_zeros_and_reward_models(model: Path, tmp_path: Path) -> None:
    write(model, run__json={"seed": 0, "warmup_ratio": 0.0, "bf16": False, "tau": None})
    card = write_card(model, "me/x")
    assert "| seed | 0 |" in card and "| warmup_ratio | 0.0 |" in card and "bf16" not in card and "tau" not in card
    write(model, config__json={"architectures": ["LlamaForSequenceClassification"]})
    card = write_card(model, "me/x")
    assert "AutoModelForSequenceClassification" in card and "pipeline_tag: text-classification" in card
    assert "CausalLM" not in card
    config = {"base_model_name_or_path": "org/base", "task_type": "SEQ_CLS"}
    card = write_card(write(tmp_path / "lora", adapter_config__json=config), "me/x")
    assert "AutoPeftModelForSequenceClassification" in card and "base_model: org/base" in card


@pytest.mark.parametrize(
    "name, content, said",
    [
        ("metrics.json", '{"a": 1', "metrics.json is no JSON"),
        ("metrics.json", '{"after": [1]}', "metrics.json is not as"),
        ("evaluation/evaluation.json", "", "evaluation.json is no JSON"),
        ("evaluation/evaluation.json", '{"winrate": {"win_rate": 3}}', "evaluation.json is not as .*reference"),
    ],
)
def test_half_written_records(model: Path, name: str, content: str, said: str) -> None:
    (model / name).parent.mkdir(exist_ok=True)
    (model / name).write_text(content)
    with pytest.raises(UserError, match=said):
        write_card(model, "me/x")


def test_where_a_pull_may_write(tmp_path: Path) -> None:
    out = tmp_path / "out"
    _check_free("me/x", out)
    out.mkdir()
    _check_free("me/x", out)
    write(out, run__json={}, **{MANIFEST.replace(".", "__"): {"files": {}}})
    with pytest.raises(UserError, match="is no earlier pull of me/x"):
        _check_free("me/x", out)
    for name in ("run.json", MANIFEST):
        (out / DOWNLOADS).mkdir(parents=True, exist_ok=True)
        (out / DOWNLOADS / f"{name}.metadata").write_text("")
    (out / PULLED).write_text("me/x")
    _check_free("me/x", out)
    with pytest.raises(UserError, match="is no earlier pull of me/y"):
        _check_free("me/y", out)
    (out / "checkpoint-5").mkdir()
    (out / "checkpoint-5" / "x").write_text("")
    with pytest.raises(UserError, match="holds checkpoint-5/x"):
        _check_free("me/x", out)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES, errno.EROFS, errno.EDQUOT])
def test_a_full_disk_is_no_lost_hub(number: int) -> None:
    with pytest.raises(UserError, match="^out/x cannot be written") as error, _said("me/x"):
        raise OSError(number, os.strerror(number), "out/x")
    assert "Hub was lost" not in str(error.value)
    with pytest.raises(UserError, match="the Hub was lost on the way"), _said("me/x"):
        raise ConnectionResetError(errno.ECONNRESET, "reset")
