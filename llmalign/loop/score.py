"""Log-probs of completions under a frozen model, in the layout and the precision in which training scores them."""

from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from datasets import Dataset

from llmalign.loop.run import ADAPTER_CONFIG, Run
from llmalign.prepare import Data
from llmalign.train import build
from llmalign.trainers import METHODS
from llmalign.types import PromptGroups

# Of a method's config: what reaches a score, or says where it is computed.
SCORING_KEYS = (
    "bf16", "fp16", "use_cpu", "scoring", "max_length", "pad_to_multiple_of", "per_device_train_batch_size",
    "per_device_eval_batch_size", "trust_remote_code", "model_init_kwargs", "activation_checkpointing",
    "gradient_checkpointing", "router_aux_loss_coef",
)  # fmt: skip
CARRIER = METHODS["pair"]  # the model lies in a trainer, as it does while it is trained
ONE_ROW = Dataset.from_dict(  # a trainer must have data; with its log-probs there, no reference is loaded
    {"row_id": [0], "prompt_ids": [[0]], "chosen_ids": [[0]], "rejected_ids": [[0]], "ref_chosen_logps": [0.0],
     "ref_rejected_logps": [0.0]}
)  # fmt: skip
TOKENS_PER_BATCH = 16_384
CHECKED = 4  # prompts that the layout is checked on


class FrozenScorer:
    """Scores completions under one model of a run; the model is let go with it.

    `first` is what the layout is checked on, the same wherever a run goes on, so that the same layout is chosen.
    """

    def __init__(self, run: Run, model: str, first: PromptGroups) -> None:
        config = {key: value for key, value in run.recipe.config.items() if key in SCORING_KEYS}
        self._scratch = TemporaryDirectory(prefix="llmalign-score-")  # a trainer makes its output folder
        config |= {"output_dir": self._scratch.name, "report_to": "none", "alarm_prompts": 0}
        recipe = replace(run.recipe, method=CARRIER, config=config)
        options = replace(run.options, model_name_or_path=model)
        self._trainer: Any = build(recipe, recipe.training_config(), options, run.tokenizer, Data(ONE_ROW, None, {}))
        # A whole model under a LoRA recipe carries a new adapter, which is off.
        self._adapter = "default" if (Path(model) / ADAPTER_CONFIG).is_file() else None
        self.logps(first)

    def logps(self, groups: PromptGroups) -> list[float]:
        """Log-probs of all completions, prompt by prompt, in nats."""
        return self._trainer.frozen_logps(self._trainer.model, groups, self._adapter).float().cpu().tolist()

    def rows(self, groups: PromptGroups) -> list[list[float]]:
        """Log-probs of each prompt's completions, in batches of about so many tokens, longest prompts first."""
        results: list[list[float]] = [[] for _ in groups.prompts]
        for batch in groups.batches(TOKENS_PER_BATCH):
            values = iter(self.logps(groups.take(batch)))
            for row in batch:
                results[row] = [next(values) for _ in groups.completions[row]]
        return results

    def close(self) -> None:
        """Let the model go, before another is loaded."""
        del self._trainer
        self._scratch.cleanup()
