"""One measurement: this project or TRL on one case, in the process that imports this module."""

import gc
import resource
import sys
import time
from dataclasses import dataclass
from typing import Any

import psutil
import torch
import transformers
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase, TrainerCallback
from trl import DPOConfig, DPOTrainer
from trl.trainer.utils import add_fused_lm_head

from benching import cases
from benching.limit import LORA_RANK
from llmalign import PairConfig, PairTrainer
from llmalign.scores.scoring import AUTO, Scorer
from llmalign.types import PromptGroups

BETA, LEARNING_RATE = 0.1, 1e-4
WARM_UP = 1  # steps that do not count
#: what TRL 1.16's DPOTrainer asks of its fused head for the policy
DPO_OUTPUTS = ("log_probs", "entropy", "mean_logits", "is_top1")


class Clock:
    """Seconds between marks: this process's CPU time, or the GPU's time between events."""

    def __init__(self, device: str) -> None:
        self._cuda = device == "cuda"
        self._marks: list[Any] = []
        self._made = time.process_time()
        self.setup_seconds = 0.0  # CPU time from here to the first mark

    def mark(self) -> None:
        if not self._marks:
            self.setup_seconds = time.process_time() - self._made
        if self._cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._marks.append(event)
        else:
            self._marks.append(time.process_time())

    def seconds(self) -> list[float]:
        """Of every step after the warm-up."""
        pairs = list(zip(self._marks, self._marks[1:], strict=False))[WARM_UP:]
        if not self._cuda:
            return [after - before for before, after in pairs]
        torch.cuda.synchronize()
        return [before.elapsed_time(after) / 1000 for before, after in pairs]


class Memory:
    """Peak memory above what the process held when this was made: resident, or allocated on the GPU."""

    def __init__(self, device: str) -> None:
        self._cuda = device == "cuda"
        gc.collect()
        self._before = torch.cuda.memory_allocated() if self._cuda else psutil.Process().memory_info().rss

    def megabytes(self) -> float:
        """Peak in units of 10^6 bytes, since the start of the process."""
        if self._cuda:
            return (torch.cuda.max_memory_allocated() - self._before) / 1e6
        unit = 1 if sys.platform == "darwin" else 1024
        return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit - self._before) / 1e6


@dataclass(frozen=True)
class Outcome:
    """Seconds and losses of the counted steps, peak megabytes, the layout, and CPU seconds before the first step."""

    seconds: list[float]
    losses: list[float]
    megabytes: float
    layout: str
    setup_seconds: float


class StepClock(TrainerCallback):
    """Marks the start of every optimizer step and the end of the run."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.clock.mark()

    on_train_end = on_step_begin


def pair_rows(case: cases.Case, steps: int, quick: bool) -> Dataset:
    """The pairs of that many batches in the order of training."""
    groups = [group for batch in cases.batches(case, steps, quick=quick) for group in batch]
    return Dataset.from_list(
        [
            {"prompt": prompt, "chosen": chosen, "rejected": rejected}
            for prompt, (chosen, rejected) in cases.texts(groups, case.shape.vocabulary)
        ]
    )


def train(job: cases.Job, tokenizer: PreTrainedTokenizerBase) -> Outcome:
    """Train for the job's steps.

    Both trainers get the same fields. Of ours, everything that TRL does not have stays at its default, so that the
    layout is the one that a user gets; where a case says so, the cache of reference log-probs is switched on.
    """
    case = job.get_case()
    steps = WARM_UP + case.counted_steps(job.steps)
    rows = pair_rows(case, steps, job.quick)
    clock, memory = Clock(job.device), Memory(job.device)
    common = {
        "output_dir": f"{job.folder}/{job.case}/{job.contender}",
        "use_cpu": job.device == "cpu",
        "bf16": job.dtype == "bfloat16",
        "gradient_checkpointing": False,
        "model_init_kwargs": {"dtype": job.dtype},
        "beta": BETA,
        "per_device_train_batch_size": cases.PAIRS,
        "max_steps": WARM_UP if job.contender == "fill" else steps,
        "train_sampling_strategy": "sequential",
        "learning_rate": LEARNING_RATE,
        "lr_scheduler_type": "constant",
        "max_length": cases.MAX_LENGTH,
        "precompute_ref_log_probs": job.contender in ("fill", "trl-precomputed"),
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }
    if job.contender.startswith("trl"):
        trainer_class, config = DPOTrainer, DPOConfig(**common)
    else:
        if case.cached:
            common |= {"precompute_ref_log_probs": True, "reference_cache_dir": f"{job.folder}/cache"}
        trainer_class, config = PairTrainer, PairConfig(loss="dpo", **common)
    lora = LoraConfig(r=LORA_RANK, target_modules="all-linear", task_type="CAUSAL_LM") if case.lora else None
    torch.manual_seed(0)
    trainer = trainer_class(
        model=job.model,
        args=config,
        train_dataset=rows,
        processing_class=tokenizer,
        peft_config=lora,
        callbacks=[StepClock(clock)],
    )
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    layout = "padded" if job.contender.startswith("trl") else trainer.scorer.kind
    return Outcome(clock.seconds(), losses[WARM_UP:], memory.megabytes(), layout, clock.setup_seconds)


def forward_backward(job: cases.Job, tokenizer: PreTrainedTokenizerBase) -> Outcome:
    """Policy forward and backward of one prompt with its completions: no reference, no optimizer.

    TRL's side is its fused head with all that its DPOTrainer asks of it, on one padded row a completion.
    """
    case = job.get_case()
    groups = [batch[0] for batch in cases.batches(case, WARM_UP + job.steps, quick=job.quick)]
    ids = [
        PromptGroups([tokenizer(prompt)["input_ids"]], [tokenizer(completions)["input_ids"]])
        for prompt, completions in cases.texts(groups, case.shape.vocabulary)
    ]
    device = torch.device(job.device)
    clock, memory = Clock(job.device), Memory(job.device)
    model = AutoModelForCausalLM.from_pretrained(job.model, dtype=job.dtype).to(device).train()
    scorer = Scorer(AUTO, pad_token_id=tokenizer.pad_token_id)
    scorer.choose(model.config)
    ours = job.contender == "ours"
    if ours:
        scorer.attach(model)
    else:
        add_fused_lm_head(model, outputs=DPO_OUTPUTS)
    losses = []
    for group in ids:
        clock.mark()
        logps = scorer.logps(model, group, device=device) if ours else padded_logps(model, group, device)
        loss = -logps.mean()
        loss.backward()
        model.zero_grad(set_to_none=True)
        losses.append(loss.detach())
    clock.mark()
    layout = scorer.kind if ours else "padded"
    return Outcome(
        clock.seconds(), torch.stack(losses).tolist()[WARM_UP:], memory.megabytes(), layout, clock.setup_seconds
    )


def padded_logps(model: Any, group: PromptGroups, device: torch.device) -> torch.Tensor:
    """Log-probs (N,) of completions of one length by TRL's fused head, each on a row with its prompt."""
    (prompt,) = group.prompts
    input_ids = torch.tensor([prompt + completion for completion in group.completions[0]], device=device)
    labels = input_ids.clone()
    labels[:, : len(prompt)] = -100
    output = model(
        input_ids=input_ids,
        attention_mask=torch.ones_like(input_ids),
        labels=labels,
        use_cache=False,
        fused_lm_head=True,
    )
    return output.log_probs.sum(dim=1)
