"""Groups of completions whose prompt is read once: the same as read one by one, and the right distribution."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import (
    BloomConfig,
    GenerationConfig,
    GPT2Config,
    MistralConfig,
    MistralForCausalLM,
    RwkvConfig,
    RwkvForCausalLM,
)

from llmalign.errors import UserError
from llmalign.scores.sampling import context_length, cut_at_end, memory_said, sample_completions, sample_groups
from tests.trainers import tiny

END = 1
PROMPTS = [[5, 6, 7, 8, 9, 10], [11], [12, 13, 14], [15, 16, 17], [20, 21]]


def sliding(window):
    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=264, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, pad_token_id=0, eos_token_id=1, bos_token_id=None,
        initializer_range=0.3, sliding_window=window,
    )  # fmt: skip
    return MistralForCausalLM(config)


def one_by_one(model, prompts, samples, **options):
    """The same completions from prompts that are repeated, so that each is read for itself."""
    repeated = [prompt for prompt in prompts for _ in range(samples)]
    drawn = sample_completions(model, tiny.tokenizer(), repeated, **options)
    return [drawn[place * samples : (place + 1) * samples] for place in range(len(prompts))]


class Reads:
    """Counts the tokens that a model is fed."""

    def __init__(self, model):
        self.shapes = []
        model.register_forward_pre_hook(self._count, with_kwargs=True)

    def _count(self, model, args, kwargs):
        self.shapes.append(tuple(kwargs["input_ids"].shape))


@pytest.mark.parametrize("samples", [2, 3, 8])
def test_a_shared_prompt_gives_what_repeated_prompts_give(samples):
    """All lengths in one batch, one token alone too, and in batches of two prompts each."""
    model = tiny.model()
    for batch_size in (64, 2 * samples):
        options = {"max_new_tokens": 10, "seed": 5, "batch_size": batch_size}
        groups = sample_groups(model, tiny.tokenizer(), PROMPTS, samples=samples, **options)
        assert groups == one_by_one(model, PROMPTS, samples, **options)
        assert all(len(group) == samples for group in groups)
        assert len({tuple(ids) for group in groups for ids in group}) > samples


def test_a_prompt_is_read_once_for_all_of_its_completions():
    model = tiny.model()
    reads = Reads(model)
    sample_groups(model, tiny.tokenizer(), PROMPTS[:1] * 2, samples=4, max_new_tokens=3, seed=0)
    # Five of the six tokens for both prompts; the last one and what is drawn for all eight completions.
    assert reads.shapes[:2] == [(2, 5), (8, 1)] and set(reads.shapes[1:]) == {(8, 1)}


def test_a_prompt_of_one_token_leaves_nothing_to_share():
    model = tiny.model()
    options = {"max_new_tokens": 6, "seed": 2}
    groups = sample_groups(model, tiny.tokenizer(), [[5], [6]], samples=3, **options)
    assert groups == one_by_one(model, [[5], [6]], 3, **options)


def test_a_batch_has_so_many_completions_or_those_of_one_prompt():
    model, starts = tiny.model(), []

    def progress(steps):
        starts.append(list(steps))
        return steps

    for batch_size in (12, 11, 3):
        sample_groups(
            model, tiny.tokenizer(), PROMPTS, samples=4, max_new_tokens=1, batch_size=batch_size, progress=progress
        )
    assert starts == [[0, 3], [0, 2, 4], [0, 1, 2, 3, 4]]


def test_seeds_decide_and_the_caller_s_state_is_left():
    model, tokenizer = tiny.model().train(), tiny.tokenizer()
    options = {"samples": 4, "max_new_tokens": 8}
    before = torch.get_rng_state()
    first = sample_groups(model, tokenizer, PROMPTS, seed=3, **options)
    assert torch.equal(before, torch.get_rng_state()) and model.training
    torch.manual_seed(99)
    assert first == sample_groups(model, tokenizer, PROMPTS, seed=3, **options)
    assert first != sample_groups(model, tokenizer, PROMPTS, seed=4, **options)


def test_a_completion_ends_with_its_end_token():
    model, tokenizer = tiny.model(), tiny.tokenizer()
    with torch.no_grad():
        model.lm_head.weight[END] += 0.2
    drawn = [ids for g in sample_groups(model, tokenizer, PROMPTS, samples=16, max_new_tokens=20, seed=0) for ids in g]
    ended = [ids for ids in drawn if ids[-1] == END]
    assert ended and all(END not in ids[:-1] for ids in drawn)
    assert all(ids[-1] == END or len(ids) == 20 for ids in drawn)


@pytest.mark.parametrize(
    ("tokens", "ends", "kept"),
    [
        ([3, 1, 4, 1], [1], [3, 1]), ([3, 4], [1], [3, 4]), ([3, 9, 1], [1, 9], [3, 9]), ([1], [1], [1]),
        ([3, 4], [], [3, 4]), ([], [1], []),
    ],
)  # fmt: skip
def test_what_follows_the_end_is_cut(tokens, ends, kept):
    assert cut_at_end(tokens, ends) == kept


class TwoTokens(nn.Module):
    """Logits that depend on the last token alone: after 5 comes 6 at 0.75, after 6 comes 6 at 0.2, else 5."""

    def __init__(self, model):
        super().__init__()
        table = torch.full((264, 264), -1e4)
        table[:, 5], table[:, 6] = 0.0, torch.tensor(0.25).log() - torch.tensor(0.75).log()
        table[5, 5], table[5, 6] = torch.tensor(0.25).log(), torch.tensor(0.75).log()
        table[6, 5], table[6, 6] = torch.tensor(0.8).log(), torch.tensor(0.2).log()
        model.register_forward_pre_hook(self._keep, with_kwargs=True)
        self.table = table

    def _keep(self, model, args, kwargs):
        self.last = kwargs["input_ids"][:, -1]

    def forward(self, hidden):
        return self.table[self.last][:, None]


def frequencies(**options):
    """Shares of the four completions of two tokens after a prompt that ends with 5."""
    model = tiny.model()
    model.lm_head = TwoTokens(model)
    groups = sample_groups(
        model, tiny.tokenizer(), [[7, 5], [5, 7, 5]], samples=2000, max_new_tokens=2, seed=1, batch_size=4000, **options
    )
    shares = []
    for group in groups:
        drawn = [tuple(ids) for ids in group]
        shares.append({pair: drawn.count(pair) / 2000 for pair in [(5, 5), (5, 6), (6, 5), (6, 6)]})
        assert sum(shares[-1].values()) == pytest.approx(1)
    return shares


def test_completions_of_a_group_follow_the_model_independently():
    """Within four standard errors of 1/4 * 1/4, 1/4 * 3/4, 3/4 * 4/5, 3/4 * 1/5."""
    expected = {(5, 5): 0.0625, (5, 6): 0.1875, (6, 5): 0.6, (6, 6): 0.15}
    for shares in frequencies():
        for pair, p in expected.items():
            assert abs(shares[pair] - p) <= 4 * (p * (1 - p) / 2000) ** 0.5, (pair, shares)


def test_temperature_and_top_p_shape_the_distribution():
    """At one half probabilities are squared; 0.7 of the mass is the likelier token alone: 6, then 5."""
    odds = {5: (1 / 10, 9 / 10), 6: (16 / 17, 1 / 17)}  # of 5 and 6, after 5 and after 6
    for shares in frequencies(temperature=0.5):
        for (first, second), share in shares.items():
            p = odds[5][first - 5] * odds[first][second - 5]
            assert abs(share - p) <= 4 * (p * (1 - p) / 2000) ** 0.5, (first, second, shares)
    for shares in frequencies(top_p=0.7):
        assert shares[6, 5] == 1.0
    assert all(shares[6, 5] < 0.7 for shares in frequencies(top_p=1.0))


def test_windows_that_slide_are_read_one_by_one_and_are_still_right():
    """Of six tokens a window of four would lose two if its keys were repeated carelessly."""
    model, options = sliding(4), {"max_new_tokens": 8, "seed": 3, "batch_size": 64}
    reads = Reads(model)
    groups = sample_groups(model, tiny.tokenizer(), PROMPTS, samples=4, **options)
    assert reads.shapes[0] == (20, 6), "a prompt was shared"
    assert groups == one_by_one(model, PROMPTS, 4, **options)
    assert groups != sample_groups(sliding(None), tiny.tokenizer(), PROMPTS, samples=4, **options), "no window at work"


def test_a_model_without_keys_and_values_is_read_one_by_one():
    torch.manual_seed(0)
    config = RwkvConfig(vocab_size=264, hidden_size=32, num_hidden_layers=2, pad_token_id=0, eos_token_id=1)
    model, options = RwkvForCausalLM(config), {"max_new_tokens": 4, "seed": 3}
    groups = sample_groups(model, tiny.tokenizer(), [[5, 6], [7, 8]], samples=2, **options)
    assert groups == one_by_one(model, [[5, 6], [7, 8]], 2, **options)


def test_one_completion_a_prompt_is_what_generate_gives():
    """Batches by length, longest first, padded on the left, one seed for all of them."""
    model, tokenizer = tiny.model().eval(), tiny.tokenizer()
    options = {"temperature": 0.7, "top_p": 0.9, "max_new_tokens": 8}
    drawn = sample_completions(model, tokenizer, PROMPTS, seed=4, batch_size=2, **options)
    config = GenerationConfig(do_sample=True, top_k=0, eos_token_id=END, pad_token_id=0, **options)
    order, expected = [0, 2, 3, 4, 1], {}
    with torch.random.fork_rng():
        torch.manual_seed(4)
        for rows in (order[:2], order[2:4], order[4:]):
            width = max(len(PROMPTS[row]) for row in rows)
            ids = torch.tensor([[0] * (width - len(PROMPTS[row])) + PROMPTS[row] for row in rows])
            mask = torch.tensor([[int(place >= width - len(PROMPTS[row])) for place in range(width)] for row in rows])
            output = model.generate(input_ids=ids, attention_mask=mask, generation_config=config)
            for row, tokens in zip(rows, output[:, width:].tolist(), strict=True):
                expected[row] = tokens[: tokens.index(END) + 1] if END in tokens else tokens
    assert drawn == [expected[row] for row in range(len(PROMPTS))]


def test_greedy_groups_are_all_alike():
    groups = sample_groups(tiny.model(), tiny.tokenizer(), PROMPTS, samples=3, max_new_tokens=5, temperature=0)
    assert all(group[0] == group[1] == group[2] for group in groups) and len({tuple(g[0]) for g in groups}) > 1


@pytest.mark.parametrize("adapter", [False, True])
@pytest.mark.parametrize(
    "own", [{"min_p": 0.9}, {"repetition_penalty": 1e6}, {"suppress_tokens": [*range(2, 99)]}, {"typical_p": 0.05}]
)
def test_a_model_s_own_settings_change_nothing(own, adapter):
    options = {"max_new_tokens": 30, "seed": 3}
    expected = sample_completions(tiny.model(), tiny.tokenizer(), PROMPTS, **options)
    model = inner = tiny.model()
    model.generation_config.update(do_sample=True, **own)
    if adapter:
        model = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))
    before = [model.generation_config.to_dict(), inner.generation_config.to_dict()]
    with torch.no_grad():
        ids = torch.tensor([PROMPTS[0]])
        torch.manual_seed(3)
        theirs = model.generate(input_ids=ids, do_sample=True, top_k=0, max_new_tokens=30)[
            0, len(PROMPTS[0]) :
        ].tolist()
    assert theirs != sample_completions(model, tiny.tokenizer(), PROMPTS[:1], **options)[0], "they change nothing here"
    assert sample_completions(model, tiny.tokenizer(), PROMPTS, **options) == expected
    assert [model.generation_config.to_dict(), inner.generation_config.to_dict()] == before


def test_the_context_has_many_names():
    assert context_length(MistralConfig(max_position_embeddings=77)) == 77
    assert context_length(GPT2Config(n_positions=33)) == 33
    assert context_length(BloomConfig()) is None


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory."), MemoryError(),
                                   RuntimeError("DefaultCPUAllocator: can't allocate memory")])  # fmt: skip
def test_memory_that_runs_out_is_said(error):
    with pytest.raises(UserError, match="not enough memory .*: eat less"), memory_said("eat less"):
        raise error
    with pytest.raises(RuntimeError, match="shapes"), memory_said("eat less"):
        raise RuntimeError("shapes differ")
