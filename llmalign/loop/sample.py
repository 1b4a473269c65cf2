"""The stage `sample`: completions of a round's prompts under its model, shard by shard."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from llmalign.loop.run import Run
from llmalign.loop.shards import write_shards
from llmalign.loop.stages import Made, Row, read_rows
from llmalign.scores.sampling import end_token_ids, sample_groups
from llmalign.trainers._trl import load_frozen
from llmalign.trainers.loading import model_arguments
from llmalign.trainers.vllm import VLLMSampler

SAMPLES = "samples.jsonl"


def sample(run: Run, folder: Path, model: str, prompts: list[Row], samples: int, seed: int) -> Made:
    """Sample completions of all prompts into `samples.jsonl`; a shard that is there is not sampled again.

    Every shard has prompts and a seed of its own, so what is drawn does not depend on where a run was stopped or on how
    many processes share the shards.
    """
    made = write_shards(
        run,
        folder,
        prompts,
        size=run.loop.shard_prompts,
        start=lambda: Sampler(run, model, samples),
        work=lambda sampler, rows, shard: sampler.rows(rows, run.seed(seed, shard)),
        into=SAMPLES,
        what="Sampling",
        alone=run.loop.vllm_server is not None,
    )
    if not run.main:
        return made
    lengths, truncated = [], 0
    for row in read_rows(folder / SAMPLES):
        lengths += [len(ids) for ids in row["completion_ids"]]
        truncated += row["ended"].count(False)
    made.counts = {"prompts": len(prompts), "completions": len(lengths), "truncated": truncated}
    made.measured = {"mean_length": round(sum(lengths) / len(lengths), 2)}
    made.cost = {"tokens": sum(lengths)}
    return made


class Sampler:
    """Draws completions from a model that is loaded here, or from a vLLM server that is given its weights."""

    def __init__(self, run: Run, model: str, samples: int) -> None:
        self._run, self._samples = run, samples
        self._server = None
        if run.loop.vllm_server is not None:  # a server knows no adapters: they are merged
            self._model: Any = load_frozen(model, run.config).to(run.config.device)
            self._server = VLLMSampler(run.loop.vllm_server, self._model, timeout=run.loop.vllm_timeout)
        else:
            self._model = _as_it_is_trained(run, model)
        self._model.eval()
        self._ends = end_token_ids(self._model, run.tokenizer)

    def rows(self, prompts: list[Row], seed: int) -> list[Row]:
        """The prompts with their completions: texts, ids, and whether each ended by itself."""
        ids = [row["prompt_ids"] for row in prompts]
        return [
            {
                **row,
                "completions": [self._run.tokenizer.decode(own, skip_special_tokens=True) for own in group],
                "completion_ids": group,
                "ended": [bool(own) and own[-1] in self._ends for own in group],
            }
            for row, group in zip(prompts, self._draw(ids, seed), strict=True)
        ]

    def close(self) -> None:
        """Leave the server, if there is one."""
        if self._server is not None:
            self._server.close()

    def _draw(self, prompt_ids: list[list[int]], seed: int) -> list[list[list[int]]]:
        loop = self._run.loop
        options: dict[str, Any] = {
            "samples": self._samples, "max_new_tokens": loop.max_new_tokens, "temperature": loop.temperature,
            "top_p": loop.top_p, "seed": seed,
        }  # fmt: skip
        if self._server is not None:
            return self._server.draw(prompt_ids, ends=self._ends, **options)
        with torch.autocast(self._model.device.type, dtype=torch.bfloat16, enabled=bool(self._run.config.bf16)):
            return sample_groups(
                self._model, self._run.tokenizer, prompt_ids, batch_size=loop.sampling_batch_size, **options
            )


def _as_it_is_trained(run: Run, path: str) -> Any:
    """A model for sampling: an adapter beside its base and not merged into it, quantized weights as they are."""
    options = replace(run.options, model_name_or_path=path)
    model, keywords, _ = model_arguments(options, trust_remote_code=run.config.trust_remote_code)
    if isinstance(model, str):
        model = load_frozen(model, run.config, keywords["quantization_config"])
    return model if run.options.load_in_4bit or run.options.load_in_8bit else model.to(run.config.device)
