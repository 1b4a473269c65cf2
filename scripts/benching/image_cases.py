"""Which contenders of the image bench are compared, and what one process of it is told."""

from dataclasses import dataclass

MODES = {"kept": (False, False), "recomputed": (True, True), "as shipped": (False, True)}
TIME_TARGET, MEMORY_TARGET = 1.4, 0.6


@dataclass(frozen=True)
class Job:
    """What one process does. `contender`: ours, script, or prepare. `trained`: full, lora, or lora-two, a script's
    LoRA beside a second network. `recompute`: activations, in the backward pass. `encoders`: VAE and text encoders run
    in every step.
    """

    contender: str
    trained: str
    recompute: bool
    encoders: bool
    steps: int
    pairs: int
    folder: str
    quick: bool = False


@dataclass(frozen=True)
class Case:
    """What of ours is compared with what of the scripts', in which mode."""

    ours: str
    script: str
    mode: str

    @property
    def name(self) -> str:
        """Two words and the mode."""
        return f"{self.ours} / {self.script}, {self.mode}"

    @property
    def equal_work(self) -> bool:
        """Whether both train the same weights, and so have the same loss at every step."""
        return self.ours == self.script.removesuffix("-two")

    def jobs(self, steps: int, pairs: int, folder: str, *, quick: bool) -> dict[str, Job]:
        """The processes, in the order of their turns."""
        ours, theirs = MODES[self.mode]
        rest = (steps, pairs, folder, quick)
        return {
            "ours": Job("ours", self.ours, ours, False, *rest),
            "script": Job("script", self.script, theirs, False, *rest),
            "with encoders": Job("script", self.script, theirs, True, *rest),
        }


TRAINED = ("full", "lora", "lora-two")
PAIRINGS = (*((trained.removesuffix("-two"), trained) for trained in TRAINED), ("lora", "full"))
CASES = {case.name: case for mode in MODES for case in (Case(*pairing, mode) for pairing in PAIRINGS)}
