"""f-DPG's claims: the exact space's gradient, the story claim's distances against closed forms, and its judgement."""

import math
from pathlib import Path

import pytest
import torch
from claims import fdpg_exact, fdpg_stories, run, start
from claims.cells import Store

from llmalign.errors import UserError
from llmalign.losses import DIVERGENCES, exact_divergence


@pytest.mark.parametrize("case", fdpg_exact.CASES.values(), ids=list(fdpg_exact.CASES))
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_the_expected_loss_has_the_gradient_of_the_divergence(divergence: str, case: dict[str, str]) -> None:
    if case["target"] == "some" and divergence in fdpg_exact.INFINITE:
        pytest.skip("infinite there")
    rng = torch.Generator().manual_seed(5)
    log_target, p = fdpg_exact.target(case["target"], rng)
    logits = torch.randn(fdpg_exact.OUTCOMES, generator=rng, dtype=torch.float64).requires_grad_()
    expected_loss = fdpg_exact.expected_loss(torch.log_softmax(logits, 0), log_target, divergence, case["proposal"])
    found = torch.autograd.grad(expected_loss, logits)[0]
    exact = torch.autograd.grad(exact_divergence(torch.log_softmax(logits, 0), p.log(), divergence), logits)[0]
    assert torch.allclose(found, exact, rtol=1e-10, atol=1e-12)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> fdpg_stories.Stories:
    start.quiet()
    (cell,) = fdpg_stories.cells(True)
    setting = {**cell.setting, "pool": 256, "drawn": 256, "patterns": ["m"]}
    return fdpg_stories.stories(Store(tmp_path_factory.mktemp("stories")), setting)


def test_distances_of_the_base_from_a_constraint_are_the_closed_forms(world: fdpg_stories.Stories) -> None:
    """p is the base on what satisfies, divided by the share z that does."""
    z = float(world.features(world.texts).mean())
    assert 0.05 < z < 0.95
    found = fdpg_stories.measure(world.base, world, seed=1)
    (satisfied,) = found["satisfied"]
    assert found["kl_p_pi"] == pytest.approx(-math.log(z), abs=1e-5)
    assert found["kl_pi_p"] is None and found["kl_pi_base"] == pytest.approx(0.0, abs=1e-5)
    middle = math.log(2 / (1 + z)) + satisfied * math.log(2 * z / (1 + z)) + (1 - satisfied) * math.log(2)
    assert found["js"] == pytest.approx(middle / 2, abs=1e-5)
    assert found["tv"] == pytest.approx(((1 - z) + (1 - satisfied)) / 2, abs=1e-5)


def test_a_feature_is_found_in_whole_words() -> None:
    found = fdpg_stories.contains(r"\bdogs?\b")(["A dog.", "Two dogs ran", "a dogged hot-dogger", ""])
    assert found == [1.0, 1.0, 0.0, 0.0]


def test_other_weights_are_refused(
    world: fdpg_stories.Stories, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.base.save_pretrained(tmp_path)
    monkeypatch.setenv(fdpg_stories.MODEL_VARIABLE, str(tmp_path))
    with pytest.raises(UserError, match="other weights"):
        fdpg_stories.load(Store(tmp_path), smoke=False)


def test_without_its_model_the_claim_is_skipped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv(fdpg_stories.MODEL_VARIABLE, raising=False)
    assert run.main(["fdpg_stories", "--out", str(tmp_path)]) == 0
    assert "fdpg_stories: skipped" in capsys.readouterr().out and not list(tmp_path.iterdir())


def made_up_records() -> list[dict]:
    """Three seeds of what the claim says, with a little to spare."""
    numbers = {  # satisfied, js, KL(p, pi), entropy; of the shares only the second counts
        "base": (0.07, 0.56, 2.7, 40.0),
        "forward_kl": (0.7, 0.23, 1.0, 39.0),
        "js": (0.8, 0.21, 1.1, 38.0),
        "tv": (0.78, 0.22, 1.15, 39.0),
        "reverse_kl": (0.95, 0.31, 2.3, 34.0),
    }
    records = []
    for cell in fdpg_stories.cells(False):
        if cell.method not in numbers:
            continue
        satisfied, js, kl_p_pi, entropy = numbers[cell.method]
        kind = cell.setting["target"]
        one = {
            "js": js if kind == "pointwise" or cell.method == "base" else 0.2,
            "kl_p_pi": kl_p_pi,
            "entropy": entropy,
            "kl_pi_p": None if kind == "pointwise" else 0.5,
            "tv": 0.3,
            "kl_pi_base": 2.0,
            "satisfied": [satisfied + 0.01 * cell.seed] * len(cell.setting["patterns"]),
            "distinct_2": 0.14,
            "self_bleu": 0.6,
            "curves": {},
        }
        record = {"cell": {"method": cell.method, "seed": cell.seed, "setting": cell.setting}, "result": one}
        records.append(record)
    return records


def test_the_claim_holds_where_all_of_it_does() -> None:
    outcome = fdpg_stories.judge(made_up_records())
    assert outcome.holds and "All parts are met" in outcome.verdict
    assert "the lowest Jensen-Shannon divergence to the target is that of Jensen-Shannon" in outcome.verdict
    assert outcome.rows[0][:2] == ["a word", "the base"] and len(outcome.rows) == 10
    assert outcome.rows[1][outcome.columns.index("KL(pi, p)")] == "infinite"


@pytest.mark.parametrize(
    ("method", "kind", "change", "part"),
    [
        ("tv", "pointwise", {"satisfied": [0.5]}, "tv word"),
        ("js", "pointwise", {"js": 0.3}, "js word"),
        ("forward_kl", "pointwise", {"kl_p_pi": 1.4}, "forward_kl word"),
        ("js", "pointwise", {"satisfied": [0.61]}, "js satisfies more than forward_kl"),
        ("tv", "pointwise", {"kl_p_pi": 0.1}, "forward_kl has the lowest KL"),
        ("reverse_kl", "pointwise", {"satisfied": [0.7]}, "reverse_kl satisfies most"),
        ("reverse_kl", "pointwise", {"entropy": 45.0}, "reverse_kl has the lowest entropy"),
        ("reverse_kl", "distributional", {"js": 0.29}, "reverse_kl shares"),
    ],
)
def test_each_part_can_fail(method: str, kind: str, change: dict, part: str) -> None:
    records = made_up_records()
    for record in records:
        if record["cell"]["method"] == method and record["cell"]["setting"]["target"] == kind:
            record["result"].update(change)
    outcome = fdpg_stories.judge(records)
    assert not outcome.holds and part in outcome.verdict
