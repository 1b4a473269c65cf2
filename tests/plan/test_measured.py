"""Estimates beside the peaks of real runs on a CPU, in processes of their own: within 20 %.

glibc keeps freed blocks of less than its threshold, which grows by itself to 32 MiB; so that the peak is that of what
is held, the threshold is fixed where a run is measured.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from llmalign.plan.facts import Target
from llmalign.plan.run import plan
from llmalign.recipe import load_recipe
from tests.plan import measuring

LIMIT = 0.2
THRESHOLDS = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
KINDS = {"max_position_embeddings": 1024, "tie_word_embeddings": False}
#: about 9, 46 and 148 million numbers
SHAPES = {
    "small": {"vocab_size": 8192, "hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 6,
              "num_attention_heads": 4, "num_key_value_heads": 4, **KINDS},
    "medium": {"vocab_size": 16384, "hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 10,
               "num_attention_heads": 8, "num_key_value_heads": 4, **KINDS},
    "large": {"vocab_size": 32000, "hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 14,
              "num_attention_heads": 12, "num_key_value_heads": 12, **KINDS},
    "warm": {"vocab_size": 8192, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
             "num_attention_heads": 2, "num_key_value_heads": 2, **KINDS},
}  # fmt: skip
COMMON = (
    "--max_steps 2 --report_to none --max_truncated 1 --max_identical 1 --save_strategy no --use_cpu true "
    "--per_device_train_batch_size 4 --gradient_accumulation_steps 1"
).split()
PAIRS = ["--alarm_prompts", "0"]
FLY, CACHED = ["--precompute_ref_log_probs", "false"], ["--precompute_ref_log_probs", "true"]
LORA = ["--use_peft", "true", "--lora_dropout", "0.0"]
AGAIN = ["--activation_checkpointing", "true"]
SAMPLED = ("--reward_funcs rewards.py:length --num_generations 2 --max_completion_length 48 --num_iterations 2").split()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("measured")
    measuring.write_pairs(found / "pairs.jsonl", [(130 + 3 * i, 90 + 2 * i, 80 + 3 * i) for i in range(4)])
    measuring.write_pairs(found / "warm.jsonl", [(5, 5, 6)] * 8)
    (found / "prompts.jsonl").write_text("".join(json.dumps({"prompt": f"w{i} " * 40}) + "\n" for i in range(8)))
    (found / "rewards.py").write_text(
        "def length(completions, **kwargs):\n    return [float(len(c)) for c in completions]\n"
    )
    for method in ("rpo", "mdpo"):
        (found / f"{method}.yaml").write_text(f"method: {method}\nmodel_name_or_path: named below\n")
    measuring.save_model(found / "warm", **SHAPES["warm"])
    return found


def compared(folder: Path, recipe: str, overrides: list[str], warm_up: list[str]) -> float:
    """Measured peak over the estimate."""
    result, job = folder / "result.json", folder / "job.json"
    words = {"recipe": recipe, "result": str(result), "overrides": overrides, "warm_up": warm_up}
    job.write_text(json.dumps(words))
    script = [sys.executable, measuring.__file__, str(job)]
    done = subprocess.run(script, env={**os.environ, **THRESHOLDS}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    made = plan(load_recipe(recipe, overrides), Target(), calibrate=False)
    return json.loads(result.read_text())["peak"] / made.device.total


def ratio(folder: Path, size: str, method: str, extra: list[str]) -> float:
    """The same for a model of one of the sizes."""
    if not (folder / size).is_dir():
        measuring.save_model(folder / size, **SHAPES[size])
    cache = ["--reference_cache_dir", str(folder / f"cache-{size}-{len(extra)}")] if method == "rpo" else []
    options = [*COMMON, *(PAIRS if method == "rpo" else []), *cache, *extra]
    for key in [word for word in extra if word.startswith("--")]:
        while options.count(key) > 1:  # a case's own value takes the place of the common one
            place = options.index(key)
            del options[place : place + 2]

    runs = Path(tempfile.mkdtemp(dir=folder)).name

    def words(model: str, data: str) -> list[str]:
        own = {"model_name_or_path": model, "dataset_name": data, "output_dir": f"{runs}/{model}"}
        return [*options, *(word for key, value in own.items() for word in (f"--{key}", str(folder / value)))]

    data, warm = ("pairs.jsonl", "warm.jsonl") if method == "rpo" else ("prompts.jsonl", "prompts.jsonl")
    return compared(folder, str(folder / f"{method}.yaml"), words(size, data), words("warm", warm))


def test_small(folder: Path) -> None:
    assert ratio(folder, "small", "rpo", FLY) == pytest.approx(1, abs=LIMIT)


@pytest.mark.slow
@pytest.mark.parametrize("size", ["small", "medium", "large"])
@pytest.mark.parametrize("extra", [FLY + AGAIN, CACHED, FLY + LORA, FLY + LORA + AGAIN], ids=" ".join)
def test_every_size(folder: Path, size: str, extra: list[str]) -> None:
    assert ratio(folder, size, "rpo", extra) == pytest.approx(1, abs=LIMIT)


@pytest.mark.slow
@pytest.mark.parametrize(
    "extra",
    [["--scoring", "padded", *FLY], ["--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "2", *FLY]],
    ids=" ".join,
)
def test_padded_and_accumulated(folder: Path, extra: list[str]) -> None:
    assert ratio(folder, "medium", "rpo", extra) == pytest.approx(1, abs=LIMIT)


@pytest.mark.slow
def test_sampling(folder: Path) -> None:
    assert ratio(folder, "medium", "mdpo", SAMPLED) == pytest.approx(1, abs=LIMIT)


@pytest.mark.slow
@pytest.mark.parametrize("extra", [[], LORA, AGAIN], ids=["full", "LoRA", "checkpointed"])
def test_images(folder: Path, extra: list[str], tmp_path: Path) -> None:
    if not (folder / "pipeline").is_dir():
        measuring.save_pipeline(folder / "pipeline")
    (folder / "images.yaml").write_text("method: diffusion_dpo\ndataset_name: sample:image_pairs\nmax_rows: 8\n")
    common = "--max_steps 2 --report_to none --save_strategy no --use_cpu true --per_device_train_batch_size 4".split()
    common += ["--max_small", "1"]  # the sample's pictures are enlarged
    common += ["--image_cache_dir", str(folder / "pictures"), *extra]

    def words(model: str, side: int) -> list[str]:
        own = {"model_name_or_path": model, "resolution": str(side), "output_dir": str(tmp_path / f"out-{side}")}
        return [*common, *(word for key, value in own.items() for word in (f"--{key}", value))]

    recipe = str(folder / "images.yaml")
    found = compared(folder, recipe, words(str(folder / "pipeline"), 128), words("embedded:tiny", 8))
    assert found == pytest.approx(1, abs=LIMIT)
