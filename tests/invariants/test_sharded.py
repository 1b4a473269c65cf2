"""Every layout on two processes, under DDP and ZeRO-3, ends where one process with padded batches ends.

Plain gradient descent: Adam would blow a difference of 1e-9 between two tiny gradients up to the learning rate.
"""

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.invariants.launching import NEEDS_DEEPSPEED, ROOT, environment
from tests.trainers import tiny

FLY = {"precompute_ref_log_probs": False}
#: what is trained -> the layouts and sources of the reference that must not matter to it
RUNS = {
    "dpo": {
        "shared": FLY, "free": FLY | {"scoring": "padding_free"}, "padded": FLY | {"scoring": "padded"},
        "checkpointed": FLY | {"activation_checkpointing": True}, "cached": {"precompute_ref_log_probs": True},
        "tokens": FLY | {"tokens_per_batch": 200}, "accumulated": FLY | {"gradient_accumulation_steps": 2},
    },
    "lora": {"shared": FLY, "all": {"activation_checkpointing": True, "precompute_ref_log_probs": True}},
    "copg": {"shared": {}, "free": {"scoring": "padding_free"}},
    "inpo": {"shared": {}},
}  # fmt: skip
SCRIPT = """
import copy, json, os, sys
from llmalign import CoPGConfig, CoPGTrainer, INPOConfig, INPOTrainer, PairConfig, PairTrainer
from llmalign.processes import end_processes, load_group_users
from llmalign.scores import prefix, text
from tests.trainers import tiny
from tests.trainers.building import LORA

text.CPU_CHUNK, prefix.BLOCK = 264 * 12, 5  # so that texts as short as these come to several chunks and blocks
load_group_users()
start, out, wrapper, runs = *sys.argv[1:4], json.loads(sys.argv[4])
world = int(os.environ.get("WORLD_SIZE", 1))
results = {}
for method, variants in runs.items():
    trainer, config, rows = {
        "copg": (CoPGTrainer, CoPGConfig, tiny.groups), "inpo": (INPOTrainer, INPOConfig, tiny.pairs)
    }.get(method, (PairTrainer, PairConfig, tiny.pairs))
    for name, options in variants.items():
        folder = os.path.join(out, f"{method}-{name}")
        batch = 8 // world // options.get("gradient_accumulation_steps", 1)
        args = config(
            output_dir=folder, use_cpu=True, per_device_train_batch_size=batch, max_steps=3, optim="sgd",
            learning_rate=1e-4 if method in ("copg", "inpo") else 0.01, logging_steps=1, save_strategy="no",
            report_to="none", disable_tqdm=True, alarm_prompts=0, max_length=96,
            reference_cache_dir=os.path.join(out, "cache"), **options,
        )
        if wrapper == "DeepSpeedEngine":  # which would keep weights as small as these whole on every rank
            args.deepspeed_plugin.deepspeed_config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
        built = trainer(
            model=start,
            args=args,
            train_dataset=rows(16),
            processing_class=tiny.tokenizer(),
            peft_config=copy.deepcopy(LORA) if method == "lora" else None,
        )
        built.train()
        assert built.accelerator.num_processes == world, "the processes do not know each other"
        assert type(built.model_wrapped).__name__ == wrapper, type(built.model_wrapped).__name__
        if wrapper == "DeepSpeedEngine":
            assert not any(weight.numel() for weight in built.model.parameters()), "the weights are not sharded"
        built.save_model(folder)
        entries = [entry for entry in built.state.log_history if "loss" in entry]
        steps = [[entry["loss"], entry["grad_norm"]] for entry in entries]
        results[f"{method}-{name}"] = {"steps": steps, "operations": built.state.total_flos}
        main = built.is_world_process_zero()
        del built
if main:
    with open(os.path.join(out, "results.json"), "w") as file:
        json.dump(results, file)
end_processes(together=True)
"""


def launch(folder, start, wrapper, runs, launcher):
    script = folder / "script.py"
    script.write_text(SCRIPT)
    out = folder / wrapper
    command = [sys.executable, *launcher, str(script), start, str(out), wrapper, json.dumps(runs)]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return out, json.loads((out / "results.json").read_text())


def weights(folder):
    (file,) = [path for path in folder.iterdir() if path.suffix == ".safetensors"]
    return load_file(file)


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    """What padded batches, scored on the fly on one process, end in."""
    folder = tmp_path_factory.mktemp("one")
    start = tiny.save(folder / "start", seed=0)
    runs = {method: {"one": FLY | {"scoring": "padded"}} for method in RUNS}
    alone = {"dpo", "copg", "inpo"}
    out, results = launch(folder, start, "LlamaForCausalLM", {m: r for m, r in runs.items() if m in alone}, [])
    lora, more = launch(folder, start, "PeftModelForCausalLM", {"lora": runs["lora"]}, [])
    final = {f"{m}-one": weights((out if m in alone else lora) / f"{m}-one") for m in runs}
    return start, results | more, final


@pytest.mark.slow
@pytest.mark.parametrize(
    ("wrapper", "launcher"),
    [
        ("DistributedDataParallel", ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]),
        pytest.param(
            "DeepSpeedEngine",
            ["-m", "accelerate.commands.launch", "--config_file", "accelerate_configs/zero3.yaml"],
            marks=NEEDS_DEEPSPEED,
        ),
    ],
)
def test_two_processes_in_every_layout_equal_one_padded(wrapper, launcher, one_process, tmp_path):
    start, expected, final = one_process
    out, found = launch(tmp_path, start, wrapper, RUNS, launcher)
    assert set(found) == {f"{method}-{name}" for method, runs in RUNS.items() for name in runs}
    for run, measured in found.items():
        alone = f"{run.split('-')[0]}-one"
        assert measured["operations"] == expected[alone]["operations"] > 0, f"{run} counts shards, not weights"
        # CoPG's loss is rewards (up to 2.3 apart) times log-ratios, which start at 0, of log-probs down to -163 nats:
        # float32 rounds those by up to 1.8e-5, measured against float64.
        rounding = 4e-5 if run.startswith("copg") else 1e-5
        for (loss, norm), (loss_alone, norm_alone) in zip(measured["steps"], expected[alone]["steps"], strict=True):
            assert loss == pytest.approx(loss_alone, rel=1e-5, abs=rounding), run
            assert norm == pytest.approx(norm_alone, rel=1e-5, abs=1e-5), run
        for name, weight in weights(out / run).items():
            torch.testing.assert_close(weight, final[alone][name], rtol=1e-5, atol=1e-5, msg=f"{run} {name}")
    for name, weight in AutoModelForCausalLM.from_pretrained(out / "dpo-shared").named_parameters():
        torch.testing.assert_close(weight.detach(), final["dpo-one"][name], rtol=1e-5, atol=1e-5, msg=name)
