"""`llmalign train --resume auto` of the image methods ends at the bytes of a run that was never stopped."""

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file

from llmalign.cli import main
from llmalign.diffusion.denoiser import LORA_FILE
from llmalign.trainers.run_folder import RUN_FILE
from tests.slow import all_but

UNET = "unet/diffusion_pytorch_model.safetensors"
HELD_OUT = '{heldout: {path: "sample:image_pairs", where: {split: test}, max_rows: 4}}'
SMALL = ["--max_rows", "16", "--eval_datasets", HELD_OUT, "--disable_tqdm", "true"]
LORA = ["--use_peft", "true", "--lora_r", "2", "--lora_alpha", "4"]
# What is drawn at random in training is switched on. Checkpoint 3 lies inside a round of the online methods, whose
# rounds take two steps, and after SePPO's second past checkpoint.
CASES = {
    "diffusion_dpo": ("diffusion_dpo/smoke", ["--random_flip", "image", "--caption_dropout", "0.3"], UNET),
    "diffusion_dpo-lora": (
        "diffusion_dpo/smoke",
        [*LORA, "--winner_guard", "sft", "--max_grad_norm", "0.1"],
        LORA_FILE,
    ),
    "seppo": ("seppo/smoke", ["--checkpoint_every", "1"], LORA_FILE),
    "pso_offline": ("pso/offline_smoke", ["--random_flip", "pair"], LORA_FILE),
    "d3po": ("d3po/smoke", ["--timestep_fraction", "0.5", "--inner_epochs", "2"], LORA_FILE),
    "d3po-full": ("d3po/smoke", ["--use_peft", "false", "--reference", "previous"], UNET),
    "pso": ("pso/smoke", ["--lr_scheduler_type", "cosine"], LORA_FILE),
}


@pytest.mark.parametrize("name", all_but(["diffusion_dpo-lora"], CASES))
def test_resumed_ends_as_uninterrupted(name: str, tmp_path: Path) -> None:
    recipe, options, weights = CASES[name]
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    command = ["train", f"trainers/{recipe}.yaml", *SMALL, *options]
    assert main([*command, "--output_dir", str(whole)]) == 0
    # What a run that is killed after step 3 has left behind.
    shutil.copytree(whole / "checkpoint-3", resumed / "checkpoint-3")
    shutil.copy(whole / RUN_FILE, resumed)
    assert main([*command, "--output_dir", str(resumed), "--resume", "auto"]) == 0
    ended, began = _weights(whole / weights), _weights(whole / "checkpoint-3" / weights)
    assert _weights(resumed / weights) == ended
    assert ended.keys() == began.keys() and ended != began
    logs = [_log(folder / "trainer_state.json") for folder in (whole, resumed)]
    assert [entry["step"] for entry in logs[0]] == [entry["step"] for entry in logs[1]]
    assert logs[0] == logs[1]


def _weights(file: Path) -> dict[str, bytes]:
    """The bytes of each tensor; the order of a file's header is drawn anew each time that it is written."""
    return {name: tensor.numpy().tobytes() for name, tensor in load_file(file).items()}


def _log(state: Path) -> list[dict[str, float]]:
    """The log without what is measured in seconds, and what transformers averages over the resumed part alone."""
    history = json.loads(state.read_text(encoding="utf-8"))["log_history"]
    timed = ("_runtime", "_per_second", "train_loss")
    return [{key: value for key, value in entry.items() if not key.endswith(timed)} for entry in history]


def test_a_checkpoint_without_its_weights_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["train", "trainers/diffusion_dpo/smoke.yaml", *SMALL, "--output_dir", str(tmp_path / "run")]
    command += ["--max_steps", "3"]
    assert main(command) == 0
    (tmp_path / "run" / "checkpoint-3" / UNET).unlink()
    (tmp_path / "run" / "metrics.json").unlink()
    assert main([*command, "--resume", "auto"]) == 2
    assert "checkpoint-3: the weights" in capsys.readouterr().err
    assert main(command) == 2
    assert "holds another run" in capsys.readouterr().err
