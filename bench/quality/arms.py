"""The arms of the study. A name says everything: `relu2 2:4 wide=1.5 mvue=auto dense=1/3 lr=3e-3 seed=1`."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction


@dataclass(frozen=True)
class Arm:
    """One training run.

    activation  "relu2" or "gelu"          wide      d_ff over 4 * width
    sparse      trained by a Recipe        method    of the Recipe
    mvue        what weight gradients prune: output, input, auto, True, False as of the Recipe; "h": dy of up and h of
                down, what "auto" settles on with squared ReLU
    dense       last part of the steps that is dense
    decay, interval, lr, seed              as ever
    """

    name: str
    activation: str = "relu2"
    sparse: bool = False
    wide: float = 1.0
    method: str = "fst"
    mvue: str = "h"
    dense: float = 1 / 6
    decay: float = 6e-5
    interval: int = 40
    lr: float = 3e-3
    seed: int = 0
    precision: str = ""

    @property
    def group(self) -> str:
        """The name without its seed: arms to be averaged."""
        return " ".join(part for part in self.name.split() if not part.startswith("seed="))


def parse(name: str) -> Arm:
    """`ACTIVATION dense|2:4 [key=value ...]` -> Arm. Raises ValueError for anything else."""
    activation, kind, *settings = name.split()
    if activation not in ("relu2", "gelu") or kind not in ("dense", "2:4"):
        raise ValueError(f"an arm begins with relu2 or gelu, then dense or 2:4, got {name!r}")
    values = dict(setting.split("=") for setting in settings)
    return Arm(name, activation, kind == "2:4", **{key: _value(key, text) for key, text in values.items()})


def _value(key: str, text: str):
    kind = Arm.__dataclass_fields__[key].type
    return float(Fraction(text)) if key == "dense" else {"int": int, "float": float}.get(kind, str)(text)


def mvue_of(arm: Arm) -> bool | str:
    return {"True": True, "False": False, "h": True}.get(arm.mvue, arm.mvue)
