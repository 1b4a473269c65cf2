"""The moments of a run on text: what is held while it scores ahead, samples, scores, trains, steps and evaluates."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np

from llmalign.errors import UserError
from llmalign.plan.facts import GROUPS, PAIRS, PROMPTS, TEXT, Facts, frozen_outline
from llmalign.plan.memory import FOREACH, generation_cache, head_logits, sampling_logits
from llmalign.plan.outline import Weights
from llmalign.plan.passes import DPO, OURS, SCORER, SFT, Pass, Passes
from llmalign.plan.rows import Lengths, longest_batch, sampled_steps, steps_of
from llmalign.plan.sharding import DEEPSPEED, SHARDED, SINGLE, Device, Held, spread
from llmalign.plan.trace import Peak
from llmalign.scores.scoring import PADDED
from llmalign.trainers.references import AHEAD_TOKENS

STEP_OF = {"dpo": DPO, "sft": SFT, "reward": SCORER, "preference": SCORER}
TRAINING, STEPPING, AHEAD, EVALUATING, SAMPLING, ROLLOUT = (
    "a step's backward pass", "the optimizer's step", "scoring the reference ahead", "evaluation", "sampling",
    "scoring a rollout",
)  # fmt: skip


class TextPlan:
    """The memory of one run, config by config and batch by batch."""

    def __init__(self, facts: Facts) -> None:
        self.facts = facts
        self.partial = False  # whether sums lack passes that could not be told
        config = facts.config
        self.step = STEP_OF.get(facts.method, OURS)
        self.passes = Passes(
            facts.outline,
            step=self.step,
            temperature=config.temperature if facts.kind == PROMPTS else 1.0,
            multiple_of=config.pad_to_multiple_of,
        )
        scorer = self.passes.scorer(config.scoring) if self.step == OURS else None
        self.layout = PADDED if scorer is None else scorer.kind
        self.rows = self._rolled_out() if facts.kind == PROMPTS else facts.lengths
        self.sizes = self.rows.sizes(self.layout, multiple_of=config.pad_to_multiple_of)
        self.frozen = dict(self._frozen_models())
        self.beside = self._critic()

    def _rolled_out(self) -> Lengths:
        """A row a prompt with all of its completions at their longest."""
        facts = self.facts
        prompts, count = facts.lengths.prompts, facts.group
        size = np.full(len(prompts) * count, facts.config.max_completion_length)
        facts.notes.append("sampled completions are taken at their longest, max_completion_length")
        return Lengths(prompts, size, np.full(len(prompts), count))

    @property
    def optimizer(self) -> Any:
        """As the config names it."""
        return self.facts.config.optim

    # -- steps ----------------------------------------------------------------------------------------------------

    def rollout_parts(self, size: int, accumulation: int) -> int:
        """Micro-batches of a rollout, as TRL has them: of the recipe, else those of a step."""
        given = self.facts.recipe.config
        if given.get("generation_batch_size"):
            return max(given["generation_batch_size"] // (size * self.facts.target.devices), 1)
        return given.get("steps_per_generation") or accumulation

    def steps(self, size: int, accumulation: int) -> int:
        """Optimizer steps of the run with this batch on each device."""
        facts, args = self.facts, self.facts.config
        rows, ends = len(facts.lengths), (args.num_train_epochs, args.max_steps)
        if facts.kind != PROMPTS:
            return steps_of(rows, size, accumulation, facts.target.devices, *ends)
        parts = self.rollout_parts(size, accumulation)
        rollout = size * parts * facts.target.devices // facts.group
        return sampled_steps(rows, rollout, parts * args.num_iterations, accumulation, *ends)

    def epochs(self, rows: int) -> float:
        """Passes over the data in which so many rows (completions, where they are sampled) are trained on."""
        facts, args = self.facts, self.facts.config
        if args.max_steps <= 0:
            return args.num_train_epochs
        a_pass = len(facts.lengths) * (facts.group * args.num_iterations if facts.kind == PROMPTS else 1)
        return rows / max(a_pass, 1)

    # -- what is held beside the policy --------------------------------------------------------------------------

    def ahead(self, config: str = SINGLE) -> bool:
        """Whether the reference's log-probs are looked up and not scored during training, as References chooses."""
        facts = self.facts
        if facts.kind not in (PAIRS, GROUPS) or self.step != OURS:
            return bool(facts.method == "dpo" and facts.config.precompute_ref_log_probs)
        wanted = facts.config.precompute_ref_log_probs
        if wanted is not None or config in SHARDED:
            return bool(wanted)
        args, rows = facts.config, len(facts.lengths)
        # the recipe's rows a step are kept on any number of devices, each of which takes one at least
        step = max(args.per_device_train_batch_size * args.gradient_accumulation_steps, facts.target.devices)
        visits = args.max_steps * step if args.max_steps > 0 else int(args.num_train_epochs * rows)
        return rows < visits if facts.outline.adapter is not None else rows <= visits

    @property
    def scores_reference(self) -> bool:
        """Whether the method compares with a frozen model at all."""
        facts = self.facts
        if facts.kind == PROMPTS:
            return facts.method not in ("mdpo", "pf_ppo") or facts.config.beta > 0
        return facts.method not in ("sft", "reward", "preference")

    def _frozen_models(self) -> Iterator[tuple[str, Weights]]:
        facts, args = self.facts, self.facts.config
        path = args.ref_model_name_or_path if self.step == OURS else None
        if self.scores_reference and (path is not None or facts.outline.adapter is None):
            yield "reference", frozen_outline(facts, path).weights()
        if facts.method == "inpo" and args.last_model_name_or_path is not None:
            yield "previous iterate", frozen_outline(facts, args.last_model_name_or_path).weights()
        for name in (args.reward_models or ()) if facts.kind == PROMPTS else ():
            try:
                yield f"reward model {name}", frozen_outline(facts, name, scorer=True).weights()
            except UserError as error:
                facts.notes.append(f"not modelled: the reward model {name} ({error})")
        if facts.kind == PROMPTS and args.reward_funcs:
            facts.notes.append("not modelled: what reward functions hold and how long they take")

    def _critic(self) -> dict[str, float]:
        """A critic of its own: float32 weights, gradients and Adam's state; its activations are like the policy's."""
        facts, args = self.facts, self.facts.config
        if facts.method != "pf_ppo" or args.advantage != "gae" or args.critic != "model":
            return {}
        name = args.critic_model_name_or_path or (args.reward_models or [None])[0]
        outline = replace(facts.outline, adapter=None, scorer=True)
        if name is not None:
            try:
                outline = frozen_outline(facts, name, scorer=True)
            except UserError:
                facts.notes.append(f"the critic {name} could not be read and is taken to be as large as the policy")
        ratio = facts.state / max(facts.weights.trained, 1)
        return {"critic": outline.weights().count * (4 + 4 + ratio)}

    def held(self, config: str) -> Held:
        """What a run holds under a config, beside its passes."""
        frozen = dict(self.frozen)
        if self.ahead(config) and "reference" in frozen:
            del frozen["reference"]
        facts = self.facts
        return Held(facts.weights, facts.state, facts.bf16, frozen, dict(self.beside))

    # -- passes ---------------------------------------------------------------------------------------------------

    def batch(self, size: int) -> Lengths:
        """The longest micro-batch that `size` rows a device (completions, where they are sampled) may make."""
        facts = self.facts
        if facts.kind == PROMPTS:
            size = max(size // facts.group, 1)
        if facts.kind == TEXT and (facts.config.packing or facts.config.padding_free):
            return self._packed(size)
        return longest_batch(self.rows, self.sizes, size, self._budget)

    def _packed(self, size: int) -> Lengths:
        length = self.facts.config.max_length or int(self.rows.completions.max())
        tokens = size * length
        if not self.facts.config.packing:
            tokens = int(np.sort(self.rows.completions)[::-1][:size].sum())
        return Lengths.alike(1, 0, [tokens])

    def accumulates(self, size: int, accumulation: int) -> bool:
        """Whether gradients of an earlier part of the step are there when a part begins."""
        parts = self._budget is not None and len(self.batch(size)) < min(size, len(self.rows))
        return accumulation > 1 or parts

    @property
    def _budget(self) -> int | None:
        """Tokens of a micro-batch, where the recipe says so."""
        facts = self.facts
        return facts.config.tokens_per_batch if self.step == OURS and facts.kind in (PAIRS, GROUPS) else None

    def peak(self, config: str, size: int, accumulation: int, *, checkpointing: bool) -> Peak:
        """Of a training pass over the longest micro-batch."""
        facts = self.facts
        engine = config in SHARDED and facts.bf16
        peak = self._told(
            Pass(
                self.batch(size),
                kind=self.layout,
                reference=self.scores_reference and facts.kind != PROMPTS and not self.ahead(config),
                checkpointing=checkpointing,
                bf16=facts.bf16,
                engine=engine,
                gradients=self.accumulates(size, accumulation),
            )
        )
        if self.beside:  # both networks' activations wait for one backward pass
            peak = replace(peak, activations=2 * peak.activations)
        return self._on_device(peak, self.batch(size))

    def _told(self, what: Pass) -> Peak:
        """A pass's peak; where it cannot be told, that is noted, and sums are what is held at least."""
        try:
            return self.passes.peak(what)
        except UserError as error:
            self.partial = True
            note = f"not modelled: activations and logits; {error}; every sum here is without them"
            if note not in self.facts.notes:
                self.facts.notes.append(note)
            return Peak(gradients=self.facts.weights.trained_bytes if what.backward else 0.0)

    def _on_device(self, peak: Peak, batch: Lengths) -> Peak:
        """Chunks of a head are larger on a GPU than on the CPU where passes are traced."""
        if not self.facts.target.cuda or self.step == SCORER:
            return peak
        vocabulary = self.facts.outline.vocabulary
        size = 2 if self.facts.bf16 else 4
        return replace(peak, logits=head_logits(int(batch.completions.sum()), vocabulary, itemsize=size))

    def _without_gradients(self, batch: Lengths) -> Peak:
        what = Pass(batch, kind=self.layout, backward=False, bf16=self.facts.bf16)
        return self._on_device(self._told(what), batch)

    # -- moments --------------------------------------------------------------------------------------------------

    def floor(self, config: str) -> float:
        """Bytes of a device without any pass."""
        return spread(config, self.facts.target.devices, self.held(config), Peak(), cuda=self.facts.target.cuda).total

    def device(self, config: str, size: int, accumulation: int, *, checkpointing: bool) -> tuple[Device, str]:
        """The worst moment on one device, and its name."""
        facts, held = self.facts, self.held(config)
        devices, cuda = facts.target.devices, facts.target.cuda
        peak = self.peak(config, size, accumulation, checkpointing=checkpointing)
        found = {TRAINING: spread(config, devices, held, peak, cuda=cuda)}
        stepping = spread(config, devices, held, Peak(gradients=facts.weights.trained_bytes), cuda=cuda)
        if cuda and facts.config.optim in FOREACH:
            stepping.parts["the optimizer's copies"] = facts.weights.trained_bytes
        found[STEPPING] = stepping
        for name, peak, extra, started in self._others(config, size, accumulation):
            own = held if started else replace(held, state=0.0)
            device = spread(config, devices, own, peak, cuda=cuda)
            device.parts |= extra
            found[name] = device
        name = max(found, key=lambda each: found[each].total)
        return found[name], name

    def _others(self, config: str, size: int, accumulation: int) -> Iterator[tuple[str, Peak, dict[str, float], bool]]:
        """Moments without gradients: their pass, what else they hold, and whether the optimizer has its state."""
        facts, args = self.facts, self.facts.config
        if self.step == OURS and facts.kind != PROMPTS and self.ahead(config) and config not in DEEPSPEED:
            budget = args.tokens_per_batch or AHEAD_TOKENS
            ahead = longest_batch(self.rows, self.sizes, len(self.rows), budget)
            yield AHEAD, self._without_gradients(ahead), {}, False
        if facts.evaluated and self.step == OURS and facts.kind != PROMPTS:
            longest = longest_batch(self.rows, self.sizes, args.per_device_eval_batch_size)
            yield EVALUATING, self._without_gradients(longest), {}, True
        if facts.kind != PROMPTS:
            return
        yield ROLLOUT, self._without_gradients(self.batch(size)), {}, True
        if args.use_vllm:
            note = "not modelled: what vLLM holds (vllm_gpu_memory_utilization of the device, where it shares it)"
            if note not in facts.notes:
                facts.notes.append(note)
            return
        count = args.sampling_batch_size or size * self.rollout_parts(size, accumulation)
        yield SAMPLING, Peak(), self.sampling(count), True

    def sampling(self, count: int) -> dict[str, float]:
        """The cache of keys and values of so many completions, and the numbers of one step."""
        config, facts = self.facts.outline.config.get_text_config(), self.facts
        known = config.to_dict()
        heads = config.num_attention_heads
        kv_heads = known.get("num_key_value_heads") or heads
        size = known.get("head_dim") or config.hidden_size // heads
        tokens = int(facts.lengths.prompts.max(initial=1)) + facts.config.max_completion_length
        itemsize = 2 if facts.bf16 else facts.outline.dtype.itemsize
        cache = generation_cache(facts.outline.layers, kv_heads, size, itemsize, count, tokens)
        prompt = Lengths.alike(count, int(facts.lengths.prompts.max(initial=1)), [1])
        reading = self._told(Pass(prompt, kind=PADDED, backward=False, bf16=facts.bf16))
        grown = cache / facts.outline.layers  # a layer's old and new cache are both there while it grows
        return {
            "sampling cache": cache + grown,
            "sampled logits": sampling_logits(count, facts.outline.vocabulary),
            "activations": reading.activations,
        }
