"""The surface of TRL 1.16 that `llmalign.trainers._trl` builds on: when one of these fails, read that file first."""

import ast
import inspect
from pathlib import Path

import pytest
import trl
from trl import data_utils
from trl.trainer import utils

import llmalign.trainers._trl as seam


def parameters(function):
    return list(inspect.signature(function).parameters)


def test_dpo_trainer_s_seams():
    assert parameters(trl.DPOTrainer.compute_loss)[:5] == [
        "self", "model", "inputs", "return_outputs", "num_items_in_batch",
    ]  # fmt: skip
    assert parameters(trl.DPOTrainer.compute_ref_log_probs) == ["self", "model", "inputs"]
    assert parameters(trl.DPOTrainer._prepare_dataset) == [
        "self", "dataset", "processing_class", "args", "dataset_name",
    ]  # fmt: skip
    assert parameters(trl.DPOTrainer._precompute_ref_logps) == ["self", "dataset", "name", "batch_size"]
    assert parameters(trl.DPOTrainer._set_signature_columns_if_needed) == ["self"]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("_generate_single_turn", ["self", "prompt_ids", "images", "multimodal_fields"]),
        ("_calculate_rewards", ["self", "inputs", "prompts", "completions", "completion_ids_list"]),
        ("_generate_and_score_completions", ["self", "inputs"]),
    ],
)
def test_rloo_trainer_s_seams(name, expected):
    assert parameters(getattr(trl.RLOOTrainer, name)) == expected


def test_rloo_trainer_scores_by_four_arguments():
    method = trl.RLOOTrainer._get_per_token_logps_and_entropies
    assert parameters(method)[:5] == ["self", "model", "input_ids", "attention_mask", "logits_to_keep"]


def test_preparation_needs_nothing_of_the_trainer_but_its_tokenizer():
    """`prepare_pairs` calls it without an instance."""
    tree = ast.parse(inspect.cleandoc("\n" + inspect.getsource(trl.DPOTrainer._prepare_dataset)))
    used = {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "self"
    }
    assert used == {"_tokenizer"}


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (utils.add_fused_lm_head, ["model", "temperature", "cast_lm_head_to_fp32", "outputs"]),
        (utils.use_adapter, ["model", "adapter_name"]),
        (utils.create_model_from_path, ["model_id", "architecture", "kwargs"]),
        (utils.disable_dropout_in_model, ["model"]),
        (data_utils._tokenize, ["processing_class", "input", "apply_chat_template_kwargs"]),
        (data_utils.common_prefix_length, ["ids", "other_ids"]),
    ],
)
def test_helpers(function, expected):
    assert parameters(function) == expected


def test_only_the_seam_names_private_trl():
    """Everything else under trainers/ imports what TRL exports at its top level."""
    for path in Path(seam.__file__).parent.glob("*.py"):
        if path.name in ("_trl.py", "fused_head.py"):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "trl":
                # TRL documents its vLLM client under its own module alone.
                assert node.module in ("trl", "trl.generation.vllm_client"), f"{path.name} imports from {node.module}"
                assert not any(alias.name.startswith("_") for alias in node.names)
