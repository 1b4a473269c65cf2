"""A token that a recipe or a command line holds is in no log, no message and no file of the run."""

import json
import logging
import pickle
from pathlib import Path

import pytest
import torch

from llmalign import PairConfig, PairTrainer
from llmalign.cli import main
from llmalign.errors import UserError
from llmalign.secrets import HIDDEN, Redacting, redacted
from llmalign.trainers.run_folder import record_run
from llmalign.values import convert
from tests.trainers import tiny
from tests.trainers.building import build
from tests.trainers.toy_runs import make

TOKEN = "hf_abcdefghijklmnopqrstuvwx"


def test_what_looks_like_a_secret_is_taken_out_of_a_text() -> None:
    said = redacted(f"GET https://me:pass@host/x with {TOKEN}, sk-0123456789abcdefgh and Bearer 0123456789abcdef")
    assert said == f"GET https://{HIDDEN}@host/x with {HIDDEN}, {HIDDEN} and {HIDDEN}"
    assert redacted("the task-specific skill of step 3") == "the task-specific skill of step 3"


def test_the_tokens_of_the_environment_are_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "plain-looking-key")
    monkeypatch.setenv("SHORT_TOKEN", "a")
    assert redacted("logged in with plain-looking-key") == f"logged in with {HIDDEN}"


def test_log_messages_are_redacted_with_their_arguments() -> None:
    record = logging.LogRecord("x", logging.INFO, "x", 1, "token %s of %d", (TOKEN, 3), None)
    assert Redacting().filter(record)
    assert record.getMessage() == f"token {HIDDEN} of 3"


def test_a_value_of_the_wrong_type_is_not_repeated() -> None:
    with pytest.raises(UserError) as error:
        convert("hub_token", ["not-like-any-token"], str | None)
    assert "not-like-any-token" not in str(error.value) and HIDDEN in str(error.value)


def test_a_checkpoint_holds_no_token(tmp_path: Path) -> None:
    trainer = make(tmp_path / "run", max_steps=2)
    trainer.args.hub_token = TOKEN
    trainer.train()
    kept = tmp_path / "run" / "checkpoint-2" / "training_args.bin"
    assert torch.load(kept, weights_only=False, pickle_module=pickle).hub_token is None
    assert trainer.args.hub_token == TOKEN
    assert not _holding(tmp_path, TOKEN)


@pytest.mark.parametrize("wrong", [[], ["--beta", TOKEN], ["--push_to_hub", "true"], ["--nonsense", TOKEN]])
def test_a_run_tells_no_token(wrong, tmp_path, capfd, caplog) -> None:
    model = tiny.save(tmp_path / "model")
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in tiny.pairs(8)))
    words = ["train", "trainers/rpo/smoke.yaml", "--model_name_or_path", model, "--dataset_name", str(rows)]
    words += ["--output_dir", str(tmp_path / "run"), "--max_steps", "1", "--alarm_prompts", "0", "--save_steps", "1"]
    with caplog.at_level(logging.DEBUG):
        assert main([*words, "--hub_token", TOKEN, *wrong]) == (2 if wrong else 0)
    out = capfd.readouterr()
    assert TOKEN not in out.out + out.err
    assert not _holding(tmp_path, TOKEN)


def _holding(folder: Path, token: str) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file() and token.encode() in path.read_bytes()]


def test_a_token_for_loading_the_model_is_written_nowhere(tmp_path: Path) -> None:
    given = {"token": TOKEN, "attn_implementation": "eager"}
    trainer = build(PairTrainer, PairConfig, tiny.model(), tmp_path / "run", save_steps=1, save_strategy="steps",
                    max_steps=1)  # fmt: skip
    trainer.args.model_init_kwargs = given
    trainer.train()
    record_run(tmp_path / "run", {"model_init_kwargs": given, "eos_token": "</s>"})
    assert not _holding(tmp_path, TOKEN)
    assert trainer.args.model_init_kwargs == given
    kept = json.loads((tmp_path / "run" / "run.json").read_text())
    assert kept == {"model_init_kwargs": {"token": HIDDEN, "attn_implementation": "eager"}, "eos_token": "</s>"}
