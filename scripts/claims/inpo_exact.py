"""INPO on a four-action intransitive game with expected labels: the loss's minimiser against the closed form."""

from pathlib import Path

import torch

from claims import game
from claims.cells import Cell, Result, Store, package_files
from claims.game import Game, all_comparisons, fit, gap, mirror_step
from claims.report import Claim, Figure, Outcome

GAME = Game(
    beats=torch.tensor(
        [[0.5, 0.9, 0.2, 0.6], [0.1, 0.5, 0.8, 0.7], [0.8, 0.2, 0.5, 0.55], [0.4, 0.3, 0.45, 0.5]], dtype=torch.float64
    ),
    reference=torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64),
    tau=0.2,
)
LABELS = {
    "closed_form": "closed form (equation 5)",
    "loss": "minimiser of llmalign.losses.inpo",
    "dpo": "DPO, previous iterate",
}


def iterate(method: str, game: Game, rounds: int, options: dict[str, float]) -> list[torch.Tensor]:
    """pi_1 = the reference, then `rounds` iterates, as log-probs (A,)."""
    reference = game.reference.log()
    policies = [reference]
    for _ in range(rounds):
        last = policies[-1]
        if method == "closed_form":
            policies.append(mirror_step(last, game, options["eta"]))
        elif method == "loss":
            keywords = {"eta": options["eta"], "tau": game.tau, "ridge": 0.0}
            policies.append(fit("inpo", last, reference, all_comparisons(last, game), keywords))
        else:
            keywords = {"beta": options["beta"], "ridge": 0.0}
            policies.append(fit("dpo", last, last, all_comparisons(last, game), keywords))
    return policies


def cells(smoke: bool) -> list[Cell]:
    if smoke:
        return [Cell("inpo_exact", m, 0, {"eta": 0.6, "rounds": 2}) for m in ("closed_form", "loss")]
    methods = {"closed_form": {"eta": 0.6}, "loss": {"eta": 0.6}, "dpo": {"beta": 1.0}}
    return [Cell("inpo_exact", m, 0, {**options, "rounds": 8}) for m, options in methods.items()]


def experiment(cell: Cell, store: Store) -> Result:
    policies = iterate(cell.method, GAME, cell.setting["rounds"], cell.setting)
    return {"gap": [gap(p, GAME) for p in policies], "policies": [p.exp().tolist() for p in policies]}


def judge(records: list[Result]) -> Outcome:
    results = {r["cell"]["method"]: r["result"] for r in records}
    gaps = {m: r["gap"] for m, r in results.items()}
    pairs = zip(results["closed_form"]["policies"], results["loss"]["policies"], strict=True)
    apart = max(abs(a - b) for one, other in pairs for a, b in zip(one, other, strict=True))
    falls = all(b < a for a, b in zip(gaps["loss"], gaps["loss"][1:], strict=False))
    beside = f" DPO with the previous iterate as reference ends at {gaps['dpo'][-1]:.3f}." if "dpo" in gaps else ""

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        styles = {"closed_form": "o", "loss": "-", "dpo": "--"}
        for method, values in gaps.items():
            axes.plot(range(1, len(values) + 1), values, styles[method], label=LABELS[method])
        axes.set(yscale="log", xlabel="iterate", ylabel="duality gap", title="Four actions, expected labels")
        axes.legend()

    return Outcome(
        holds=apart < 1e-8 and falls,
        verdict=(
            f"The minimiser of the loss is the closed form to {apart:.0e} in every probability; the duality gap falls "
            f"at every iteration, from {gaps['loss'][0]:.3e} to {gaps['loss'][-1]:.3e}.{beside}"
        ),
        columns=["iterate", *(LABELS[m] for m in gaps)],
        rows=[[str(k + 1), *(f"{gaps[m][k]:.6e}" for m in gaps)] for k in range(len(gaps["loss"]))],
        numbers={"gap": gaps, "largest_difference": apart},
        draw=draw,
    )


CLAIM = Claim(
    name="inpo_exact",
    statement=(
        "On an intransitive four-action game the exact minimiser of INPO's loss is the mirror-descent step, and the "
        "duality gap falls towards 0 (eta .6, tau .2)."
    ),
    cells=cells,
    experiment=experiment,
    judge=judge,
    sources=(Path(__file__), Path(game.__file__), *package_files("llmalign.losses")),
)
