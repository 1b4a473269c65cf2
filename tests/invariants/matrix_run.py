"""Trains the named trainers one after another in the processes of a launcher, and writes down what they logged.

`matrix_run.py START OUT WRAPPER NAME...`: START is a saved model, OUT a folder that gets results.json.
"""

import copy
import json
import os
import sys
from pathlib import Path

from safetensors.torch import load_file
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from llmalign.errors import UserError
from llmalign.processes import end_processes, load_group_users
from llmalign.trainers import METHODS
from tests.trainers import sampled_runs, tiny
from tests.trainers.building import LORA

#: a row of the matrix that is not a method of its own -> the method and what is different
VARIANTS = {"rpo_lora": ("rpo", {"activation_checkpointing": True})}
#: the on-policy ones -> their names in sampled_runs
SAMPLED = {
    "copg_online": "copg", "fdpg": "fdpg", "mdpo": "mdpo", "pf_ppo": "pf_ppo", "pf_ppo_model": "pf_ppo-model",
    "pf_ppo_group": "pf_ppo-group",
}  # fmt: skip
#: Adam's steps, kept from blowing up the difference between two gradients of nearly nothing by a large epsilon
COMMON = {
    "max_steps": 3, "learning_rate": 1e-3, "adam_epsilon": 1e-3, "logging_steps": 1, "save_strategy": "no",
    "report_to": "none", "disable_tqdm": True,
}  # fmt: skip
#: these go on from their checkpoint of step 2 as well
RESUMED, CHECKPOINT = ("rpo", "rpo_lora"), "checkpoint-2"
KEPT = ("loss", "grad_norm", "eval_loss", "critic/grad_norm", "critic/value_loss", "kl_to_reference")


def texts(n, seed=0):
    return tiny.pairs(n, seed).map(lambda row: {"text": row["prompt"] + row["chosen"]}).select_columns(["text"])


def offline(name, start, folder, world):
    """A trainer on rows that are there, with a batch of eight over all processes."""
    saving = {"save_strategy": "steps", "save_steps": 2} if name in RESUMED else {}
    name, options = VARIANTS.get(name, (name, {}))
    method = METHODS[name]
    rows = {"text": texts, "groups": tiny.groups, "pairs": tiny.pairs}[method.kind]
    if "alarm_prompts" in method.config.__dataclass_fields__:
        options = options | {"alarm_prompts": 0, "precompute_ref_log_probs": False}
    config = method.config(
        output_dir=folder, use_cpu=True, per_device_train_batch_size=8 // world, per_device_eval_batch_size=1,
        max_length=96, **(COMMON | saving | options),
    )  # fmt: skip
    return method.trainer(
        model=start,
        args=config,
        train_dataset=rows(16),
        eval_dataset=rows(4, seed=5),
        processing_class=tiny.tokenizer(),
        peft_config=copy.deepcopy(LORA) if options.get("activation_checkpointing") else None,
    )


def up_to_one(prompts, completions, **columns):
    return [value / 4 for value in sampled_runs.checksum(prompts, completions)]


def sampling(name, start, folder, world):
    """A trainer on recorded completions, with sixteen a step over all processes."""
    options = COMMON | {"learning_rate": 1e-4, "max_grad_norm": 1e9}  # DeepSpeed clips a policy and its critic as one
    return sampled_runs.build(
        SAMPLED[name], folder, model=start, record=True, reward=up_to_one, per_device_train_batch_size=16 // world,
        **options,
    )  # fmt: skip


def wrapper_of(trainer):
    wrapped = trainer.model_wrapped
    return "FSDPModule" if isinstance(wrapped, FSDPModule) else type(wrapped).__name__


def share_every_weight(config):
    """ZeRO-3 keeps weights as small as these whole on every rank otherwise."""
    plugin = config.deepspeed_plugin
    if plugin is not None and plugin.zero_stage == 3:
        plugin.deepspeed_config["zero_optimization"]["stage3_param_persistence_threshold"] = 0


def train(name, start, out, world, wrapper):
    """What the trainer logged; {"refused": sentence} where it says that it cannot be trained like this."""
    folder = os.path.join(out, name)
    try:
        trainer = (sampling if name in SAMPLED else offline)(name, start, folder, world)
        share_every_weight(trainer.args)
        trainer.train()
    except UserError as error:
        return {"refused": str(error)}
    assert trainer.accelerator.num_processes == world, "the processes do not know each other"
    assert world == 1 or wrapper_of(trainer) == wrapper, wrapper_of(trainer)
    plugin = trainer.args.deepspeed_plugin
    if plugin is not None:
        assert trainer.model_wrapped.zero_optimization_stage() == plugin.zero_stage
        if plugin.zero_stage == 3:
            assert not any(weight.numel() for weight in trainer.model.parameters()), "the weights are not sharded"
    if wrapper == "FSDPModule":
        assert all(isinstance(weight, DTensor) for weight in trainer.model.parameters()), "the weights are not sharded"
    if trainer.eval_dataset is not None:
        trainer.evaluate()
    trainer.save_model(folder)
    history = trainer.state.log_history
    found = {"logged": [{key: entry[key] for key in KEPT if key in entry} for entry in history]}
    del trainer
    if name in RESUMED:
        again = offline(name, start, f"{folder}-again", world)
        share_every_weight(again.args)
        again.train(resume_from_checkpoint=os.path.join(folder, CHECKPOINT))
        again.save_model(f"{folder}-again")
        again.accelerator.wait_for_everyone()
        found["resumed_apart"] = apart(Path(folder), Path(f"{folder}-again"))
    return found


def apart(folder, again):
    """The largest difference of a weight that two runs saved; 0 where the files hold the same bits."""
    largest = 0.0
    for path in folder.glob("*.safetensors"):
        one, other = load_file(path), load_file(again / path.name)
        assert one.keys() == other.keys()
        largest = max(largest, *(float((weight - other[name]).abs().max()) for name, weight in one.items()))
    return largest


def main():
    load_group_users()
    start, out, wrapper, *names = sys.argv[1:]
    world = int(os.environ.get("WORLD_SIZE", 1))
    results = {name: train(name, start, out, world, wrapper) for name in names}
    if int(os.environ.get("RANK", 0)) == 0:
        Path(out, "results.json").write_text(json.dumps(results))
    end_processes(together=True)


if __name__ == "__main__":
    main()
