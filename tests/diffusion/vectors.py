"""The recorded vectors of the image losses, and the inputs that they write as formulas."""

import json
import math
import re
from pathlib import Path

import torch
from torch import Tensor

VECTORS = json.loads((Path(__file__).parents[1] / "data" / "image-losses.json").read_text(encoding="utf-8"))
# The schedule of the vectors, Stable Diffusion's: diffusers has it in float32.
ALPHAS = torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2, dim=0)


def seq(text: str) -> Tensor:
    """A float64 tensor from "seq(1,1,2,2,k=1.3,s=5)": sizes, then round(s sin(k (i + 1)) + off, 6), row by row."""
    found = re.match(r"seq\(([^)]*)\)", text)
    assert found is not None, text
    parts = found[1].split(",")
    sizes = [int(part) for part in parts if "=" not in part]
    given = {"s": 1.0, "off": 0.0} | {key: float(value) for key, value in (p.split("=") for p in parts if "=" in p)}
    values = [round(given["s"] * math.sin(given["k"] * (i + 1)) + given["off"], 6) for i in range(math.prod(sizes))]
    return torch.tensor(values, dtype=torch.float64).reshape(sizes)


def tensor(values: object, grad: bool = False) -> Tensor:
    return torch.tensor(values, dtype=torch.float64, requires_grad=grad)


def assert_recorded(actual: Tensor, expected: object) -> None:
    torch.testing.assert_close(actual.detach(), tensor(expected).reshape(actual.shape), rtol=1e-9, atol=1e-12)
