"""What all stages of a run share: its recipe, its folder, its prompts, and how its models are found."""

import gc
import hashlib
import json
import logging
import os
import random
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env
from transformers import PretrainedConfig

from llmalign.assets import file_digest
from llmalign.data.formats import load
from llmalign.errors import UserError
from llmalign.loop.config import LoopConfig
from llmalign.loop.stages import MANIFEST, Made, Manifest, Row, read_manifest, run_stage
from llmalign.recipe import Recipe
from llmalign.train import model_path, what_decides_the_result
from llmalign.trainers import prepare_prompts
from llmalign.trainers.configs import ScoreConfig
from llmalign.trainers.loading import check_model_options, choose_dtype, load_tokenizer

logger = logging.getLogger(__name__)

ADAPTER_CONFIG = "adapter_config.json"
WEIGHT_FILES = (
    "*.safetensors", "*.index.json", "*model*.bin", "config.json", "generation_config.json", ADAPTER_CONFIG,
    "tokenizer*", "special_tokens_map.json", "chat_template*", "*.model", "vocab*", "merges.txt", "*.py",
)  # fmt: skip


@dataclass
class Run:
    """A run of several rounds, checked; nothing has been loaded yet.

    Raises UserError where it is made for a method, an option or a combination that rounds cannot be made of.
    """

    recipe: Recipe
    loop: LoopConfig

    def __post_init__(self) -> None:
        if self.recipe.data.holdout_rows:
            logger.info("holdout_rows is not read: rounds are measured on eval_prompts, which are never trained on.")
        self.config = self.recipe.training_config()
        self.options = self.recipe.model_config()
        _refuse(self.recipe, self.config, self.loop)
        check_model_options(self.options)
        self.options = choose_dtype(self.options, chosen="dtype" in self.recipe.model, bf16=self.config.bf16)
        # How every model of the run is loaded, as the policy is.
        chosen = {name: getattr(self.options, name) for name in ("dtype", "attn_implementation")}
        chosen = {name: value for name, value in chosen.items() if value is not None}
        self.config.model_init_kwargs = {**(self.config.model_init_kwargs or {}), **chosen}
        self.folder = Path(self.config.output_dir)
        self.rank, self.world = int(os.environ.get("RANK", "0")), self.config.world_size

    @property
    def main(self) -> bool:
        """Whether this is the process that collects and writes."""
        return self.rank == 0

    @property
    def groups(self) -> bool:
        """Whether the method trains on scored groups instead of pairs."""
        return self.recipe.method.kind == "groups"

    @property
    def needs_last(self) -> bool:
        """Whether the loss reads the previous iterate beside the reference."""
        return self.recipe.method.name == "inpo"

    def barrier(self) -> None:
        """Wait for the other processes, for a moment."""
        if self.world > 1:
            PartialState().wait_for_everyone()

    def round_folder(self, number: int) -> Path:
        """Where a round's stages lie; round 0 is the start, which is only measured."""
        return self.folder / f"round-{number}"

    def stage(
        self, number: int, name: str, inputs: dict[str, str], make: Callable[[Path], Made], seed: int | None = None
    ) -> Manifest:
        """A stage of a round, done or found; `seed` is the one that its manifest tells, open: the stage's own."""
        return run_stage(
            self.round_folder(number) / name,
            inputs=inputs,
            seed=self.seed(number, name) if seed is None else seed,
            make=make,
            precious=name == "train",
            main=self.main,
            barrier=self.barrier,
        )

    def seed(self, *place: Any) -> int:
        """A seed of its own for every round, stage and shard."""
        text = json.dumps([self.config.seed, *place])
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") >> 1

    @cached_property
    def start(self) -> str:
        """The model of round 0, where it lies."""
        with self.config.main_process_first(desc="looking for the model"):
            return model_path(str(self.options.model_name_or_path))

    @property
    def reference(self) -> str:
        """The frozen reference of all rounds: the start, unless another is named."""
        return self.config.ref_model_name_or_path or self.start

    def model(self, number: int) -> str:
        """The model that a round ended with. Raises UserError where its weights were pruned."""
        folder = self.round_folder(number) / "train"
        if number and (folder / MANIFEST).is_file() and read_manifest(folder).pruned:
            raise UserError(
                f"the weights of {folder} were pruned (keep_rounds) and are needed again, since a result that was made "
                "with them is gone: give a new output_dir"
            )
        return str(folder) if number else self.start

    def frozen_models(self, number: int) -> dict[str, str]:
        """What a round's rows are scored under, by name: the reference and, for INPO, the round before."""
        reference = self.reference if self.loop.reference == "start" else self.model(number - 1)
        return {"ref": reference} | ({"last": self.model(number - 1)} if self.needs_last else {})

    def starts_equal(self, number: int) -> bool:
        """Whether a round's rows hold log-probs of the very model that its training starts from."""
        return self.needs_last or self.frozen_models(number)["ref"] == self.model(number - 1)

    @cached_property
    def tokenizer(self) -> Any:
        """The start's tokenizer, which all rounds keep."""
        tokenizer = load_tokenizer(self.start, trust_remote_code=self.config.trust_remote_code)
        if self.recipe.config.get("eos_token"):
            tokenizer.eos_token = self.config.eos_token
        return tokenizer

    @cached_property
    def prompts(self) -> list[Row]:
        """All prompts that fit, in the run's own order: the first are those to evaluate on."""
        columns = tuple(self.loop.oracle_columns or ())
        with self.config.main_process_first(desc="reading the prompts"):
            raw = load(self.recipe.data.train_sources(), kind="prompts", seed=self.config.seed, keep=columns)
            ready = prepare_prompts(
                raw, self.tokenizer, max_length=self.longest_prompt, num_proc=self.config.dataset_num_proc
            )
        if len(ready) < len(raw):
            logger.warning(
                "%d of %d prompts are longer than %d tokens, which max_length and max_new_tokens leave them, and are "
                "left out.",
                len(raw) - len(ready), len(raw), self.longest_prompt,
            )  # fmt: skip
        rows = [{key: row[key] for key in ("row_id", "prompt", "prompt_ids", *columns)} for row in ready]
        rows = self._once(rows)
        random.Random(self.config.seed).shuffle(rows)
        if len(rows) < self.loop.eval_prompts + 1:
            raise UserError(
                f"there are {len(rows)} prompts that fit and eval_prompts takes {self.loop.eval_prompts} of them, "
                "which leaves none to train on; give more prompts or lower eval_prompts"
            )
        return rows

    def _once(self, rows: list[Row]) -> list[Row]:
        """Every prompt once, so that what is measured on is never trained on; `reuse_prompts` keeps repeated ones."""
        different = list({json.dumps(row["prompt"]): row for row in reversed(rows)}.values())[::-1]
        if len(different) == len(rows):
            return rows
        if self.loop.reuse_prompts:
            logger.warning(
                "%d of %d prompts repeat others, and reuse_prompts keeps them: rounds are measured on prompts that are "
                "trained on too.",
                len(rows) - len(different), len(rows),
            )  # fmt: skip
            return rows
        logger.warning("%d of %d prompts repeat others and are left out.", len(rows) - len(different), len(rows))
        return different

    @property
    def longest_prompt(self) -> int | None:
        """Tokens that a prompt may have, so that prompt and completion fit max_length."""
        return None if self.config.max_length is None else self.config.max_length - self.loop.max_new_tokens

    @cached_property
    def prompts_per_round(self) -> int:
        """How many prompts a round samples for. Raises UserError where there are too few."""
        left = len(self.prompts) - self.loop.eval_prompts
        wanted = self.loop.prompts_per_round or left // self.loop.rounds
        if wanted == 0 or (wanted * self.loop.rounds > left and not self.loop.reuse_prompts):
            raise UserError(
                f"{self.loop.rounds} rounds of {max(wanted, 1)} fresh prompts need more than the {left} that are left "
                "after eval_prompts: give more prompts, lower prompts_per_round, or set reuse_prompts: true"
            )
        return wanted

    def round_prompts(self, number: int) -> list[Row]:
        """The prompts of a round; each has a `place`, its position in the round. Only `reuse_prompts` begins again."""
        pool = self.prompts[self.loop.eval_prompts :]
        first = (number - 1) * self.prompts_per_round
        chosen = [pool[index % len(pool)] for index in range(first, first + self.prompts_per_round)]
        return [{"place": place, **row} for place, row in enumerate(chosen)]

    def eval_prompts(self) -> list[Row]:
        """The prompts that every round is measured on."""
        return [{"place": place, **row} for place, row in enumerate(self.prompts[: self.loop.eval_prompts])]

    def fingerprint(self) -> dict[str, Any]:
        """Everything that decides the results, flat."""
        resolved = what_decides_the_result(self.recipe, self.config, self.options)
        return {**resolved, **asdict(self.loop), "sampled_by_vllm": self.loop.vllm_server is not None}

    def round_recipe(self, number: int, folder: Path) -> Recipe:
        """The recipe of one round's training, which starts from the model of the round before."""
        config = {**self.recipe.config, "output_dir": str(folder), "seed": self.seed(number, "train")}
        config |= {"precompute_ref_log_probs": True, "eval_strategy": "no"}
        config.pop("ref_model_name_or_path", None)  # its log-probs are columns of the rows
        return replace(
            self.recipe, config=config, model={**self.recipe.model, "model_name_or_path": self.model(number - 1)}
        )


def identity(path: str) -> str:
    """What stands for a model in a manifest: the hash of its files, or its name and commit on the Hub."""
    folder = Path(path)
    if not folder.is_dir():
        try:
            return f"{path}@{PretrainedConfig.get_config_dict(path)[0].get('_commit_hash')}"
        except (OSError, ValueError) as error:
            reason = str(error).strip().split("\n")[0][:200]
            raise UserError(f"no model could be found at {path!r} ({reason}); check the path or name") from error
    digest = hashlib.sha256()
    if (folder / ADAPTER_CONFIG).is_file():
        base = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))["base_model_name_or_path"]
        digest.update(identity(base).encode())
    for name in model_files(folder):
        digest.update(name.encode() + b"\0" + file_digest(folder / name).encode())
    return digest.hexdigest()


def model_files(folder: Path) -> list[str]:
    """The files of a folder that make up a model and its tokenizer."""
    return sorted({path.name for pattern in WEIGHT_FILES for path in folder.glob(pattern) if path.is_file()})


def let_go() -> None:
    """Free the memory of models that nothing holds any more, before others are loaded."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _refuse(recipe: Recipe, config: Any, loop: LoopConfig) -> None:
    """Raise UserError for what rounds cannot be made of."""
    name = recipe.method.name
    if not issubclass(recipe.method.config, ScoreConfig) or recipe.method.kind not in ("pairs", "groups"):
        way_out = (
            "method: pair with loss: dpo" if name == "dpo" else "inpo, pair (any pairwise loss), rpo, rdpo or copg"
        )
        raise UserError(f"iterate trains by the losses of scores, not by method: {name}; use {way_out}")
    if recipe.method.kind == "groups" and loop.oracle != "reward":
        raise UserError(f"method: {name} trains on rewards: set oracle: reward")
    if loop.reference == "previous" and name == "inpo":
        raise UserError("reference: previous is INPO without its reference: set tau: 0 instead")
    for key in ("last_model_name_or_path", "last_adapter"):
        if recipe.config.get(key) is not None:
            raise UserError(f"{key} is set by iterate itself: the previous iterate is the model of the round before")
    if recipe.config.get("base", "chosen") != "chosen":
        raise UserError("base: chosen is the one that iterate has rows for; RPO's other bases need data of their own")
    if recipe.config.get("flip_rate") == "estimate":
        raise UserError("flip_rate: estimate needs an independent scorer's margins, which rounds have not; give a rate")
    if recipe.model.get("model_revision") is not None:
        raise UserError("model_revision is not read by iterate, which loads models by their folders: name a snapshot's")
    if config.load_best_model_at_end or str(config.save_strategy) == "best":
        raise UserError("load_best_model_at_end needs evaluations while training, which rounds have not; leave it out")
    if config.push_to_hub:
        raise UserError("push_to_hub would publish every round under one name; push the last round's model by hand")
    if recipe.method.kind == "groups" and (loop.select, loop.margin) != ("best_worst", 0.0):
        raise UserError(f"method: {name} trains on all completions of a prompt: select and margin are not for it")
    if recipe.data.streaming:
        raise UserError("streaming: true has no end to part into rounds; iterate reads its prompts whole")
    for key in ("eval_datasets", "dataset_test_split"):
        if getattr(recipe.data, key):
            raise UserError(f"{key} is not read by iterate, which measures every round on eval_prompts of the prompts")
    if config.max_length is not None and config.max_length <= loop.max_new_tokens:
        raise UserError(
            f"max_length {config.max_length} leaves a prompt no room beside max_new_tokens {loop.max_new_tokens}"
        )
    launched = any(parse_flag_from_env(f"ACCELERATE_USE_{name}") for name in ("DEEPSPEED", "FSDP"))
    if config.deepspeed or config.fsdp or launched:
        raise UserError("iterate samples from whole models: it runs under DDP, not under DeepSpeed or FSDP")
