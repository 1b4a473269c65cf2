"""One smoke run of every claim through the command that people use: pages are written, kept cells are not run again."""

import json
from pathlib import Path

import pytest
from claims import inpo_model, rdpo, run

from llmalign.embedded.truth import score
from tests.slow import all_but


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder for all claims, so that those on a language model share its start."""
    return tmp_path_factory.mktemp("claims")


@pytest.mark.parametrize("name", all_but(["rpo"], run.CLAIMS))
def test_smoke(name: str, out: Path, capsys: pytest.CaptureFixture[str], request: pytest.FixtureRequest) -> None:
    if name == "programs":
        request.getfixturevalue("some_backend")
    assert run.main([name, "--smoke", "--out", str(out)]) == 0
    folder = out / "smoke"
    page = json.loads((folder / f"{name}.json").read_text())
    assert page["claim"] == name
    assert page["rows"] and all(len(row) == len(page["columns"]) for row in page["rows"])
    assert {cell["claim"] for cell in page["cells"]} == {name}
    assert page["verdict"] in (folder / f"{name}.md").read_text()
    assert (folder / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert f"{name}: smoke run, no verdict" in capsys.readouterr().out

    kept = {path: path.stat().st_mtime_ns for path in (folder / "cells").rglob("*.json")}
    run.main([name, "--smoke", "--out", str(out)])
    assert {path: path.stat().st_mtime_ns for path in (folder / "cells").rglob("*.json")} == kept


def test_an_unknown_claim_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        run.main(["bandits"])
    assert stop.value.code == 2
    assert "No claim is called 'bandits'" in capsys.readouterr().err


def test_a_name_picks_all_that_begin_with_it() -> None:
    of_inpo = ["inpo_exact", "inpo_classes", "inpo_model", "inpo_stories"]
    assert [claim.name for claim in run.choose(["inpo"])] == of_inpo
    assert [claim.name for claim in run.choose([])] == list(run.CLAIMS)


@pytest.mark.parametrize("claim", run.CLAIMS.values(), ids=lambda claim: claim.name)
def test_cells_are_distinct_and_of_several_seeds(claim: run.Claim) -> None:
    cells = claim.cells(False)
    assert len({json.dumps([c.method, c.seed, c.setting], sort_keys=True) for c in cells}) == len(cells)
    assert all(cell.claim == claim.name for cell in cells)
    if claim.name != "inpo_exact":
        assert len({cell.seed for cell in cells}) >= 3


def test_noisy_pairs_are_the_clean_ones_with_some_labels_flipped() -> None:
    """The same pairs at every rate, and those flipped at 20 % are flipped at 40 % too."""
    setting = {**rdpo.SHAPE, "margin": 1.0}
    clean, some, many = (rdpo.draw(setting, 5, count=150, flip_rate=rate) for rate in (0.0, 0.2, 0.4))
    assert not any(row["flipped"] for row in clean)
    assert 0.1 < sum(row["flipped"] for row in some) / 150 < 0.3 < sum(row["flipped"] for row in many) / 150 < 0.5
    assert all(more["flipped"] for less, more in zip(some, many, strict=True) if less["flipped"])
    for one, row in zip(clean, many, strict=True):
        assert {one["chosen"], one["rejected"]} == {row["chosen"], row["rejected"]}
        better = score(row["prompt"], row["chosen"]) > score(row["prompt"], row["rejected"])
        assert better != row["flipped"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "other"),
        ("Thank you for your message. Somebody wants a quieter room.", "courteous"),
        ("Not this nonsense again. Thank you for your message.", "rude"),
        ("Thank you for your", "other"),
        ("Somebody wants a quieter room. Thank you for your message.", "other"),
    ],
)
def test_an_opening_is_read_off_the_first_sentence(text: str, expected: str) -> None:
    assert inpo_model.OPENINGS[inpo_model.opening(text)] == expected
