"""The report that `sparsify` returns."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import nn

from ..errors import Sparse24Error, Sparse24Warning

#: why a layer that is sparse already is skipped; the settings that it keeps may follow
ALREADY_SPARSE = "already sparse"
#: to whoever takes the report for the model, as `model = sparsify(model)` does
NO_MODEL = "sparsify changes the model in place and returns a report: go on with the model that was given to it"


class Skipped(NamedTuple):
    """A layer that stays as it is, and why."""

    name: str
    reason: str


@dataclass
class SparsifyReport:
    """What `sparsify` did. Truthy when it converted something.

    converted  names of the layers that now train 2:4
    skipped    (name, reason) of those that were looked at and stay as they are
    reasons    name -> why this layer trains 2:4
    shapes     name -> (out_features, in_features)
    precision  of the products of converted layers; None: 16 bits
    operand    "weight" or "activation": which operand of the products is 2:4
    fused      name of a block whose layers were converted -> "" if it runs as one function, else why it does not
    """

    converted: list[str] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)
    reasons: dict[str, str] = field(default_factory=dict)
    shapes: dict[str, tuple[int, int]] = field(default_factory=dict)
    fused: dict[str, str] = field(default_factory=dict)
    precision: str | None = None
    operand: str = "weight"

    def warn_of_kept_settings(self, stacklevel: int) -> None:
        """Warn of layers that keep settings which this call did not ask for, if there are any."""
        kept = [skip for skip in self.skipped if skip.reason.startswith(f"{ALREADY_SPARSE}, with")]
        if kept:
            warnings.warn(
                f"sparsify leaves {len(kept)} layers as they are, such as {kept[0].name}: {kept[0].reason}. To give "
                "them the settings of this call, call sparse24.densify(model) first",
                Sparse24Warning,
                stacklevel=stacklevel,
            )

    def __bool__(self) -> bool:
        return bool(self.converted)

    def __getattr__(self, name: str):
        hint = f"; {NO_MODEL}" if hasattr(nn.Module, name) else ""
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}{hint}")

    def __call__(self, *args, **kwargs):
        raise Sparse24Error(NO_MODEL)

    def __str__(self) -> str:
        kind = " ".join(filter(None, ("2:4", self.precision, "activation" if self.operand == "activation" else "")))
        rows = [
            (name, f"{self.shapes[name][0]} x {self.shapes[name][1]}", kind, self.reasons[name])
            for name in self.converted
        ]
        rows += [
            (name, "", "2:4" if reason.startswith(ALREADY_SPARSE) else "dense", reason) for name, reason in self.skipped
        ]
        weights = sum(rows * cols for rows, cols in self.shapes.values())
        what = "by 2:4 activations" if self.operand == "activation" else "2:4"
        lines = [f"sparse24: {len(self.converted)} layers {what} ({weights:,} weights), {len(self.skipped)} skipped"]
        if rows:
            widths = [max(len(row[i]) for row in rows) for i in range(3)]
            lines += ["  " + "  ".join((*map(str.ljust, row, widths), row[3])) for row in rows]
        if self.fused:
            unfused = {name: why for name, why in self.fused.items() if why}
            lines.append(f"  {len(self.fused) - len(unfused)} of {len(self.fused)} blocks run as one function")
            lines += [f"  {name or 'the model'} runs layer by layer: {why}" for name, why in unfused.items()]
        return "\n".join(lines)
