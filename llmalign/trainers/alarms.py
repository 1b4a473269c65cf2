"""Alarms: plain sentences in the log when a run goes wrong in a way that its loss does not show."""

import logging
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from typing import Any

import torch
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback, TrainerControl, TrainerState
from transformers import TrainingArguments as Args

from llmalign.scores.sampling import end_token_ids, sample_completions

logger = logging.getLogger(__name__)

GRAM = 4
# How far a share may rise above its value at the start of training; samples of 8 move by eighths.
RISE = 0.25
DRIFT = "drift/chosen"
REPETITION = "samples/repetition"
MISSING_END = "samples/missing_end"


def repetition(ids: Sequence[int]) -> float:
    """Return the share, in [0, 1], of a token sequence's 4-grams that occurred before in it; 0 below four tokens."""
    grams = [tuple(ids[start : start + GRAM]) for start in range(len(ids) - GRAM + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def missing_end(completions: Sequence[Sequence[int]], end_ids: Iterable[int]) -> float:
    """Return the share, in [0, 1], of the completions whose last token is none of `end_ids`; an empty one counts."""
    ends = set(end_ids)
    return sum(not ids or ids[-1] not in ends for ids in completions) / len(completions)


def first_prompts(dataset: Iterable[Mapping[str, Any]], count: int, room: int | None) -> list[list[int]]:
    """Return the `prompt_ids` of the first `count` rows, each cut to its last `room` tokens (None: uncut)."""
    return [list(row["prompt_ids"])[-room if room is not None else 0 :] for row in islice(dataset, count)]


class AlarmCallback(TrainerCallback):
    """Warns, once per crossing, when the chosen log-prob falls or greedy answers begin to repeat or stop ending.

    The chosen log-prob: `drift/chosen` of any training or evaluation log below `-chosen_drop` nats. Greedy answers to
    `prompt_ids`, drawn on the main process at the start, at each evaluation and at the end: the mean share of repeated
    4-grams, or the share of answers without an end-of-text in `new_tokens` tokens, more than 0.25 above its value at
    the start of training. Those shares go to `state.log_history`, where a resumed run finds its start again. `raised`
    holds every sentence. Not covered: models split over ranks (ZeRO-3, FSDP), whose answers are not drawn.
    """

    def __init__(self, prompt_ids: Sequence[Sequence[int]], *, chosen_drop: float, new_tokens: int) -> None:
        self.prompt_ids = prompt_ids
        self.chosen_drop = chosen_drop
        self.new_tokens = new_tokens
        self.raised: list[str] = []
        self._sounding: set[str] = set()

    @classmethod
    def from_args(cls, args: Any, eval_dataset: Any) -> "AlarmCallback":
        """Build the callback from a pair config's `alarm_*` fields and the first evaluation set, prepared.

        Without one nothing else is measured either, and no answers are drawn.
        """
        if isinstance(eval_dataset, dict):
            eval_dataset = next(iter(eval_dataset.values()))
        if eval_dataset is None or not args.alarm_prompts:
            return cls([], chosen_drop=args.alarm_chosen_drop, new_tokens=args.alarm_new_tokens)
        new_tokens = args.alarm_new_tokens
        if args.max_length is not None and new_tokens > args.max_length // 2:
            new_tokens = args.max_length // 2
            logger.info("Alarms draw %d tokens an answer, half of max_length, to leave room for prompts.", new_tokens)
        room = None if args.max_length is None else args.max_length - new_tokens
        prompts = first_prompts(eval_dataset, args.alarm_prompts, room)
        return cls(prompts, chosen_drop=args.alarm_chosen_drop, new_tokens=new_tokens)

    def on_log(
        self, args: Args, state: TrainerState, control: TrainerControl, logs: dict[str, float], **kwargs: Any
    ) -> None:
        if not state.is_world_process_zero:
            return
        for key, value in logs.items():
            if key == DRIFT or (key.startswith("eval_") and key.endswith(f"_{DRIFT}")):
                self._sound(
                    key,
                    value < -self.chosen_drop,
                    f"Alarm at step {state.global_step}: {key} is {value:.1f} nats, below the limit of "
                    f"-{self.chosen_drop:g}: the policy is unlearning the chosen responses.",
                )

    def on_train_begin(self, args: Args, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if not state.is_world_process_zero or not self.prompt_ids:
            return
        split = _split_over_ranks()
        if split is not None:
            logger.warning("No answers are drawn for the alarms: under %s no rank holds the whole model.", split)
            self.prompt_ids = []
        elif not _measured(state):
            self._draw(args, state, kwargs["model"], kwargs["processing_class"])

    def on_evaluate(self, args: Args, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._check(args, state, kwargs["model"], kwargs["processing_class"])

    def on_train_end(self, args: Args, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._check(args, state, kwargs["model"], kwargs["processing_class"])

    def _check(
        self, args: Args, state: TrainerState, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
    ) -> None:
        measured = _measured(state)
        # Evaluation comes once per data set, and outside training there is no start to compare with.
        if not state.is_world_process_zero or not self.prompt_ids or not measured:
            return
        if measured[-1]["step"] == state.global_step:
            return
        first, now = measured[0], self._draw(args, state, model, tokenizer)
        self._sound(
            REPETITION,
            now[REPETITION] > first[REPETITION] + RISE,
            f"Alarm at step {state.global_step}: {now[REPETITION]:.0%} of the {GRAM}-grams of greedy answers repeat, "
            f"against {first[REPETITION]:.0%} at the start of training.",
        )
        self._sound(
            MISSING_END,
            now[MISSING_END] > first[MISSING_END] + RISE,
            f"Alarm at step {state.global_step}: {now[MISSING_END]:.0%} of greedy answers do not end within "
            f"{self.new_tokens} tokens, against {first[MISSING_END]:.0%} at the start of training.",
        )

    def _draw(
        self, args: Args, state: TrainerState, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
    ) -> dict[str, float]:
        """Draw greedy answers, note their shares in the log history and return that entry."""
        logger.info(
            "Drawing %d greedy answers of up to %d tokens for the alarms (alarm_prompts: 0 turns this off).",
            len(self.prompt_ids), self.new_tokens,
        )  # fmt: skip
        dtype = torch.bfloat16 if args.bf16 else torch.float16
        with torch.autocast(model.device.type, dtype=dtype, enabled=args.bf16 or args.fp16):
            answers = sample_completions(
                model, tokenizer, self.prompt_ids, max_new_tokens=self.new_tokens, temperature=0.0
            )
        entry = {
            "epoch": state.epoch,
            "step": state.global_step,
            REPETITION: sum(repetition(ids) for ids in answers) / len(answers),
            MISSING_END: missing_end(answers, end_token_ids(model, tokenizer)),
        }
        state.log_history.append(entry)
        return entry

    def _sound(self, name: str, wrong: bool, sentence: str) -> None:
        if not wrong:
            self._sounding.discard(name)
        elif name not in self._sounding:
            self._sounding.add(name)
            self.raised.append(sentence)
            logger.warning(sentence)


def _measured(state: TrainerState) -> list[dict[str, float]]:
    return [entry for entry in state.log_history if REPETITION in entry]


def _split_over_ranks() -> str | None:
    """The name of what splits the parameters over the ranks, or None where each rank holds the whole model."""
    state = AcceleratorState()
    if state.distributed_type == DistributedType.FSDP:
        return "FSDP"
    if state.distributed_type == DistributedType.DEEPSPEED and state.deepspeed_plugin.zero_stage == 3:
        return "ZeRO-3"
    return None
