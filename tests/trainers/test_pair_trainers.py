"""Scores, losses, metrics and references of the pair trainers, against numbers computed without them."""

import contextlib
import copy

import pytest
import torch
import trl
from transformers import AutoModelForCausalLM

from llmalign import PairConfig, PairTrainer, RDPOConfig, RDPOTrainer, RPOConfig, RPOTrainer, losses
from llmalign.errors import UserError
from llmalign.scores import sequence_logps
from llmalign.trainers.pair import RowMetrics
from llmalign.types import PairScores
from tests.trainers import tiny
from tests.trainers.building import COMMON, LORA, batch, build, independent


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    return tiny.save(tmp_path_factory.mktemp("start"), seed=0)


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    return tiny.save(tmp_path_factory.mktemp("other"), seed=1)


def test_scores_are_the_sums_of_log_probs_with_the_end_token(start, other, tmp_path):
    trainer = build(RPOTrainer, RPOConfig, start, tmp_path, ref_model_name_or_path=other)
    inputs = batch(trainer)
    scores = trainer.scores(trainer.model, inputs)
    for path, chosen, rejected in (
        (start, scores.chosen, scores.rejected),
        (other, scores.ref_chosen, scores.ref_rejected),
    ):
        expected = independent(path, trainer, inputs["row_id"])
        torch.testing.assert_close(chosen.detach(), expected[0], rtol=0, atol=1e-4)
        torch.testing.assert_close(rejected.detach(), expected[1], rtol=0, atol=1e-4)
    assert all(row["chosen_ids"][-1] == 1 for row in trainer.train_dataset)
    assert scores.chosen.requires_grad and not scores.ref_chosen.requires_grad
    lengths = [len(row["chosen_ids"]) for i in inputs["row_id"] for row in trainer.train_dataset if row["row_id"] == i]
    assert scores.chosen_lengths.tolist() == lengths


def test_the_rpo_loss_is_the_paper_s_and_its_terms_are_logged_apart(start, other, tmp_path):
    trainer = build(RPOTrainer, RPOConfig, start, tmp_path, ref_model_name_or_path=other, beta=0.1, eta=0.5)
    inputs = batch(trainer)
    (chosen, rejected), (ref_chosen, ref_rejected) = (independent(p, trainer, inputs["row_id"]) for p in (start, other))
    margin = (chosen - ref_chosen) - (rejected - ref_rejected)
    expected = torch.log1p(torch.exp(-0.1 * margin)) - 0.5 * 0.1 * chosen
    assert trainer.compute_loss(trainer.model, inputs).item() == pytest.approx(expected.mean().item(), abs=1e-4)
    trainer.train()
    logs = trainer.state.log_history[0]
    assert logs["loss"] == pytest.approx(logs["loss/preference"] + logs["loss/base"], abs=1e-5)
    assert logs["rewards/margins"] == pytest.approx(logs["rewards/chosen"] - logs["rewards/rejected"], abs=1e-5)
    assert logs["rewards/chosen"] == pytest.approx(0.1 * logs["drift/chosen"], abs=1e-6)


def test_dpo_trains_to_trl_s_weights(start, tmp_path):
    """The same seed, rows and steps: an independent implementation must end at the same model."""
    ours = build(PairTrainer, PairConfig, start, tmp_path / "ours", max_steps=3)
    ours.train()
    options = {k: v for k, v in COMMON.items() if k != "alarm_prompts"} | {"max_steps": 3}
    args = trl.DPOConfig(
        output_dir=str(tmp_path / "theirs"), use_cpu=True, bf16=False, gradient_checkpointing=False, **options
    )
    theirs = trl.DPOTrainer(model=start, args=args, train_dataset=tiny.pairs(8), processing_class=tiny.tokenizer())
    theirs.train()
    for (name, mine), yours in zip(ours.model.named_parameters(), theirs.model.parameters(), strict=True):
        torch.testing.assert_close(mine, yours, rtol=0, atol=2e-6, msg=name)
    assert ours.state.log_history[1]["loss"] == pytest.approx(theirs.state.log_history[1]["loss"], abs=1e-5)


@pytest.mark.parametrize(("rows", "micro"), [(8, 3), (10, 4)])  # micro-batches of 3, 3, 2 and of 4, 4, 2
def test_accumulation_equals_one_batch_even_when_the_last_micro_batch_is_short(start, tmp_path, rows, micro):
    options = {"max_steps": -1, "num_train_epochs": 1, "max_grad_norm": 0.1, "data": tiny.pairs(rows)}
    one = build(RPOTrainer, RPOConfig, start, tmp_path / "one", per_device_train_batch_size=rows, **options)
    three = build(
        RPOTrainer, RPOConfig, start, tmp_path / "three",
        per_device_train_batch_size=micro, gradient_accumulation_steps=3, **options,
    )  # fmt: skip
    one.train()
    three.train()
    assert one.state.global_step == three.state.global_step == 1
    assert three.state.log_history[0]["loss"] == pytest.approx(one.state.log_history[0]["loss"], abs=1e-5)
    assert three.state.log_history[0]["logps/chosen"] == pytest.approx(
        one.state.log_history[0]["logps/chosen"], abs=1e-4
    )
    assert three.state.log_history[0]["grad_norm"] == pytest.approx(one.state.log_history[0]["grad_norm"], rel=1e-4)
    for mine, yours in zip(one.model.parameters(), three.model.parameters(), strict=True):
        torch.testing.assert_close(mine, yours, rtol=0, atol=1e-5)


def test_evaluation_counts_each_row_once_and_names_its_sets(start, other, tmp_path):
    sets = {"a": tiny.pairs(7, seed=3), "b": tiny.pairs(5, seed=4)}
    trainer = build(
        PairTrainer, PairConfig, start, tmp_path, ref_model_name_or_path=other, evaluation=sets,
        per_device_eval_batch_size=3,
    )  # fmt: skip
    metrics = trainer.evaluate()
    for name, n in (("a", 7), ("b", 5)):
        rows = trainer.eval_dataset[name]
        scored = [
            [sequence_logps(AutoModelForCausalLM.from_pretrained(path), [(r["prompt_ids"], r[side]) for r in rows],
                            pad_token_id=0) for side in ("chosen_ids", "rejected_ids")]
            for path in (start, other)
        ]  # fmt: skip
        assert len(rows) == n
        margin = (scored[0][0] - scored[1][0]) - (scored[0][1] - scored[1][1])
        assert metrics[f"eval_{name}_rewards/margins"] == pytest.approx(0.1 * margin.mean().item(), abs=1e-4)
        assert metrics[f"eval_{name}_rewards/accuracies"] == pytest.approx((margin > 0).float().mean().item())
        assert metrics[f"eval_{name}_loss"] == pytest.approx(
            torch.log1p(torch.exp(-0.1 * margin)).mean().item(), abs=1e-5
        )


def test_length_metrics_are_worked_out_by_hand(start, tmp_path):
    """Completions of 10 and 9, 10 and 8, 5 and 10 and 4 and 4 bytes, each with its end token."""
    sizes = [(9, 8), (9, 7), (4, 9), (3, 3)]
    rows = [{"prompt": "q", "chosen": "y" * c, "rejected": "n" * r} for c, r in sizes]
    trainer = build(PairTrainer, PairConfig, start, tmp_path, evaluation=tiny.Dataset.from_list(rows))
    metrics = trainer.evaluate()
    assert metrics["eval_rows"] == 4
    assert metrics["eval_length/longer_wins"] == (1 + 1 + 0 + 0.5) / 4
    assert metrics["eval_length/matched"] == 2 / 4  # 1 of 10 differs by a tenth, 2 of 10 by more
    assert metrics["eval_rewards/accuracies_length_matched"] == 0.5  # untrained: both ties


def test_equal_scores_count_one_half(start, tmp_path):
    trainer = build(PairTrainer, PairConfig, start, tmp_path, evaluation=tiny.pairs(5))
    assert trainer.evaluate()["eval_rewards/accuracies"] == 0.5


def test_clean_accuracy_undoes_the_known_flips(start, other, tmp_path):
    data = tiny.pairs(6, flipped=lambda i: i % 2 == 0)
    trainer = build(
        RDPOTrainer, RDPOConfig, start, tmp_path, ref_model_name_or_path=other, evaluation=data, flip_rate=0.4
    )
    metrics = trainer.evaluate()
    trainer.model.eval()
    inputs = trainer._prepare_inputs(trainer.data_collator([dict(r) for r in trainer.eval_dataset]))
    values = trainer.row_metrics(trainer.scores(trainer.model, inputs), inputs)
    right = values["rewards/accuracies"].tolist()
    clean = [1 - r if i % 2 == 0 else r for i, r in enumerate(right)]
    assert metrics["eval_rewards/accuracies_clean"] == pytest.approx(sum(clean) / 6)
    assert metrics["eval_rewards/accuracies"] == pytest.approx(sum(right) / 6)


def test_flip_rate_estimated_from_a_scorer(start, tmp_path):
    data = tiny.pairs(40, margin=lambda i: -3.0 if i % 5 == 0 else 3.0)
    trainer = build(
        RDPOTrainer, RDPOConfig, start, tmp_path, data=data, flip_rate="estimate", scorer_margin_column="margin"
    )
    # A fifth of the labels disagree with a scorer that is right with sigmoid(3) = .953:
    # the mixture (1-e) .953 + e .047 = .8 gives e = .169.
    assert trainer.flip_rate == pytest.approx(0.169, abs=0.002)


def test_a_policy_that_is_not_the_reference_is_stopped(start, tmp_path):
    trainer = build(PairTrainer, PairConfig, start, tmp_path)
    with torch.no_grad():
        trainer.ref_model.lm_head.weight.add_(0.01 * torch.randn_like(trainer.ref_model.lm_head.weight))
    with pytest.raises(ValueError, match="On the first batch the policy scores a response .* nats away"):
        trainer.train()


def test_an_explicit_reference_is_logged_not_stopped(start, other, tmp_path, caplog):
    trainer = build(PairTrainer, PairConfig, start, tmp_path, ref_model_name_or_path=other)
    with caplog.at_level("INFO"):
        trainer.train()
    assert "another reference was given" in caplog.text


def test_bf16_passes_the_start_check_within_its_own_noise(start, tmp_path, caplog):
    trainer = build(PairTrainer, PairConfig, start, tmp_path, bf16=True, max_steps=1)
    with caplog.at_level("INFO"):
        trainer.train()
    assert "Start check passed" in caplog.text


@pytest.mark.parametrize(
    ("size", "gap", "passes"),
    [
        (50.0, 9e-5, True),
        (50.0, 2e-4, False),
        (3000.0, 2.0**-12 * 4, True),  # 3,000 nats in float32: units of 2.4e-4
        (3000.0, 2e-3, False),
        (3000.0, float("nan"), False),
    ],
)
def test_the_start_check_knows_the_rounding_of_long_sums(start, tmp_path, size, gap, passes):
    trainer = build(PairTrainer, PairConfig, start, tmp_path)
    chosen = torch.tensor([-size, -20.0])
    scores = PairScores(chosen, torch.tensor([-10.0, -30.0]), chosen + gap, torch.tensor([-10.0, -30.0]))
    with contextlib.nullcontext() if passes else pytest.raises(UserError, match="nats away from the model"):
        trainer._check_start(trainer.model, batch(trainer), scores)


def test_lora_s_reference_is_the_model_without_its_adapter(start, tmp_path):
    trainer = build(RPOTrainer, RPOConfig, start, tmp_path, peft=copy.deepcopy(LORA), learning_rate=1e-2)
    frozen = {n: p.clone() for n, p in trainer.model.named_parameters() if not p.requires_grad}
    trainer.train()
    assert all(torch.equal(p, frozen[n]) for n, p in trainer.model.named_parameters() if n in frozen)
    inputs = batch(trainer)
    trainer.model.eval()
    scores = trainer.scores(trainer.model, inputs)
    expected = independent(start, trainer, inputs["row_id"])
    torch.testing.assert_close(scores.ref_chosen, expected[0], rtol=0, atol=1e-4)
    assert (scores.chosen - scores.ref_chosen).abs().max() > 1e-3  # the adapter has moved
    with trainer.model.disable_adapter():
        assert torch.equal(trainer.scores(trainer.model, inputs).ref_chosen, scores.ref_chosen)


def test_reference_log_probs_from_columns(start, tmp_path):
    data = tiny.pairs(4, ref_chosen_logps=lambda i: -10.0 - i, ref_rejected_logps=lambda i: -20.0 - i)
    trainer = build(PairTrainer, PairConfig, start, tmp_path, data=data)
    assert trainer.ref_model is None
    inputs = batch(trainer)
    assert trainer.scores(trainer.model, inputs).ref_chosen.tolist() == [-10.0 - i for i in inputs["row_id"].tolist()]


def test_precomputed_reference_equals_the_reference_on_the_fly(start, tmp_path):
    fly = build(PairTrainer, PairConfig, start, tmp_path / "a")
    kept = build(PairTrainer, PairConfig, start, tmp_path / "b", precompute_ref_log_probs=True)
    fly.train()
    kept.train()
    for mine, yours in zip(fly.model.parameters(), kept.model.parameters(), strict=True):
        torch.testing.assert_close(mine, yours, rtol=0, atol=1e-6)


def test_base_response_from_a_column(start, tmp_path):
    data = tiny.pairs(4, base=lambda i: f"base {i}")
    trainer = build(RPOTrainer, RPOConfig, start, tmp_path, data=data, base="column", beta=0.1, eta=1.0)
    inputs = batch(trainer)
    scores = trainer.scores(trainer.model, inputs)
    kept = {r["row_id"]: r for r in trainer.train_dataset}
    model = AutoModelForCausalLM.from_pretrained(start)
    sequences = [(kept[i]["prompt_ids"], kept[i]["base_ids"]) for i in inputs["row_id"].tolist()]
    torch.testing.assert_close(
        scores.base.detach(), sequence_logps(model, sequences, pad_token_id=0), rtol=0, atol=1e-4
    )
    terms = trainer.loss_terms(scores, inputs)
    torch.testing.assert_close(terms["base"], -0.1 * scores.base, rtol=0, atol=1e-4)


def test_base_response_drawn_once_from_the_reference(start, tmp_path):
    options = {"base": "reference", "base_new_tokens": 6}
    first = build(RPOTrainer, RPOConfig, start, tmp_path, **options)
    drawn = list(first.train_dataset["base_ids"])
    assert all(1 <= len(ids) <= 6 for ids in drawn)
    kept = (tmp_path / "base_responses.json").read_text()
    first.train()
    (tmp_path / "base_responses.json").write_text(kept.replace(str(drawn[0]), "[7, 1]"))  # a mark, to see who reads it
    again = build(RPOTrainer, RPOConfig, start, tmp_path, **options)
    assert list(again.train_dataset["base_ids"]) == [[7, 1], *drawn[1:]]
    anew = build(RPOTrainer, RPOConfig, start, tmp_path, seed=1, **options)
    assert [7, 1] not in list(anew.train_dataset["base_ids"])


def test_base_column_missing_is_one_sentence(start, tmp_path):
    with pytest.raises(UserError, match="add a column named base"):
        build(RPOTrainer, RPOConfig, start, tmp_path, base="column").train()


@pytest.mark.parametrize(
    "options",
    [{"loss": "cdpo", "flip_rate": 0.1}, {"loss": "ipo", "tau": 0.05}, {"loss": "slic"}, {"loss": "irpo", "alpha": 1.0},
     {"loss": "rpo", "eta": 0.1}, {"loss": "ripo", "tau": 0.05, "flip_rate": 0.2}, {"loss": "rslic", "flip_rate": 0.2},
     {"loss": "rdpo", "flip_rate": 0.2}],
)  # fmt: skip
def test_every_pairwise_loss_is_called_with_its_own_hyper_parameters(start, other, tmp_path, options):
    trainer = build(PairTrainer, PairConfig, start, tmp_path, ref_model_name_or_path=other, **options)
    inputs = batch(trainer)
    policy, reference = (independent(path, trainer, inputs["row_id"]) for path in (start, other))
    lengths = trainer.scores(trainer.model, inputs).chosen_lengths
    scores = PairScores(*policy, *reference, chosen_lengths=lengths)
    name, hyper = options["loss"], {k: v for k, v in options.items() if k != "loss"}
    if "tau" not in hyper:
        hyper["beta"] = 0.1
    expected = getattr(losses, name)(scores, **hyper).mean().item()
    assert trainer.compute_loss(trainer.model, inputs).item() == pytest.approx(expected, rel=1e-4, abs=1e-4)
    trainer.train()
    assert trainer.state.log_history[0]["loss"] != trainer.state.log_history[1]["loss"]


def test_conversations_need_a_chat_template(start, tmp_path):
    rows = [{"role": "user", "content": "hi"}], [{"role": "assistant", "content": "yes"}]
    data = tiny.Dataset.from_list([{"prompt": rows[0], "chosen": rows[1], "rejected": rows[1]}])
    args = PairConfig(output_dir=str(tmp_path), **COMMON)
    with pytest.raises(UserError, match="no chat template"):
        PairTrainer(model=start, args=args, train_dataset=data, processing_class=tiny.tokenizer(chat=False))


def test_mixtures_of_experts_are_refused_with_the_way_out(tmp_path):
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        vocab_size=264, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, num_local_experts=2, num_experts_per_tok=1, router_aux_loss_coef=0.01,
    )  # fmt: skip
    with pytest.raises(UserError, match="router_aux_loss_coef: 0"):
        build(PairTrainer, PairConfig, MixtralForCausalLM(config), tmp_path)
    build(PairTrainer, PairConfig, MixtralForCausalLM(config), tmp_path, router_aux_loss_coef=0.0, max_steps=1).train()


def test_images_are_refused(tmp_path):
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    text = LlamaConfig(
        vocab_size=264, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )  # fmt: skip
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=8, patch_size=4
    )
    seeing = LlavaForConditionalGeneration(LlavaConfig(text_config=text, vision_config=vision, image_token_index=263))
    with pytest.raises(UserError, match="vision-language models .llava. are not supported"):
        build(PairTrainer, PairConfig, seeing, tmp_path)


def test_nan_is_shown_and_only_a_missing_value_is_left_out(start, tmp_path):
    rows = RowMetrics()
    rows.add(
        torch.arange(3), {"loss": torch.tensor([1.0, torch.nan, 3.0]), "some": torch.tensor([1.0, torch.nan, 3.0])}
    )
    trainer = build(PairTrainer, PairConfig, start, tmp_path)
    means = rows.means(trainer.accelerator, unique=True, optional=frozenset({"some"}))
    assert means["some"] == 2.0 and means["rows"] == 3
    assert means["loss"] != means["loss"]


def test_an_adapter_s_dropout_is_refused_where_it_was_asked_for(start, tmp_path):
    adapter = copy.deepcopy(LORA)
    adapter.lora_dropout = 0.3
    with pytest.raises(UserError, match="lora_dropout=0.3 is not honoured"):
        build(PairTrainer, PairConfig, start, tmp_path, peft=adapter)


def test_reference_columns_must_be_everywhere_and_alone(start, other, tmp_path):
    columns = {"ref_chosen_logps": lambda i: -1.0, "ref_rejected_logps": lambda i: -1.0}
    data = tiny.pairs(4, **columns)
    with pytest.raises(UserError, match="in every data set, or in none"):
        build(PairTrainer, PairConfig, start, tmp_path, data=data, evaluation=tiny.pairs(2))
    with pytest.raises(UserError, match="the reference is given twice"):
        build(PairTrainer, PairConfig, start, tmp_path, data=data, ref_model_name_or_path=other)


def test_a_reference_that_is_not_there_is_one_sentence(start, tmp_path):
    with pytest.raises(UserError, match="no model could be loaded from 'nowhere'"):
        build(PairTrainer, PairConfig, start, tmp_path, ref_model_name_or_path="nowhere")


def test_a_stream_trains_and_evaluates(start, tmp_path):
    trainer = build(
        RPOTrainer, RPOConfig, start, tmp_path, data=tiny.pairs(16).to_iterable_dataset(),
        evaluation=tiny.pairs(5).to_iterable_dataset(), max_steps=3,
    )  # fmt: skip
    trainer.train()
    assert trainer.state.global_step == 3
    metrics = trainer.evaluate()
    assert metrics["eval_rows"] == 5 and metrics["eval_loss"] == pytest.approx(
        metrics["eval_loss/preference"] + metrics["eval_loss/base"], abs=1e-5
    )


def test_the_best_checkpoint_is_picked_over_the_metrics_of_a_named_set(start, tmp_path):
    trainer = build(
        RDPOTrainer, RDPOConfig, start, tmp_path, evaluation={"clean": tiny.pairs(9, seed=2), "b": tiny.pairs(3)},
        max_steps=4, learning_rate=1e-2, eval_strategy="steps", eval_steps=1, save_strategy="steps", save_steps=1,
        load_best_model_at_end=True, save_total_limit=1,
    )  # fmt: skip
    assert trainer.args.metric_for_best_model == "eval_clean_rewards/accuracies"
    trainer.train()
    key = "eval_clean_rewards/accuracies"
    seen = {entry["step"]: entry[key] for entry in trainer.state.log_history if key in entry}
    best = min(step for step, value in seen.items() if value == max(seen.values()))
    assert trainer.state.best_model_checkpoint == str(tmp_path / f"checkpoint-{best}")
    assert trainer.evaluate()[key] == pytest.approx(max(seen.values()))
