"""The arms of the study. A name says everything: `relu2 2:4 wide=1.5 mvue=auto dense=1/3 lr=3e-3 seed=1`."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from fractions import Fraction

#: tokens of a step -> micro-batches of 32,768 that make it up
TOKENS = {"32k": 1, "65k": 2, "131k": 4, "262k": 8}


@dataclass(frozen=True)
class Size:
    width: int
    layers: int


#: parameters in blocks, at width 1 -> the model that has them
SIZES = {"10m": Size(384, 6), "60m": Size(768, 9), "350m": Size(2048, 7)}
CHOICES = {"tokens": TOKENS, "size": SIZES, "optimizer": ("adamw", "muon"), "operand": ("weight", "activation")}
ACTIVATIONS = ("relu2", "gelu", "swiglu")
#: what feed-forward layers are -> 8-bit forms of them
PRECISIONS = {"dense": ("fp8",), "weight": ("fp8", "fp8-hybrid"), "activation": ("fp8",)}


@dataclass(frozen=True)
class Arm:
    """One training run. Arms of equal settings are equal, whatever they are called.

    activation  "relu2", "gelu" or "swiglu", the last with a gate and d_ff 2/3 of theirs: as many parameters
    wide        d_ff over 4 * width, or over 2/3 of that with a gate
    sparse      2:4, trained by a Recipe
    operand     "weight", or "activation": dense weights, 2:4 activations, and no Recipe, so what is of one says nothing
    method      of the Recipe
    mvue        what weight gradients prune: output, input, auto, True, False as of the Recipe; "h": dy of up and h of
                down, what "auto" settles on with squared ReLU
    dense       last part of the steps that is dense
    decay, interval, lr, seed  as ever; with Muon the decay is 1 where a name has none, as it is the Recipe's
    precision   of the feed-forward layers: 16 bits, or what PRECISIONS has for them; dense FP8 is torchao's, tensorwise
    tokens      of a step: a key of TOKENS. More of them make fewer steps: all arms see the same text once
    size        of the model: a key of SIZES
    optimizer   "muon": torch's, for the matrices of blocks; its updates are as large as AdamW's, `lr` is that of both
    """

    name: str = field(compare=False)
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
    tokens: str = "32k"
    size: str = "10m"
    optimizer: str = "adamw"
    operand: str = "weight"

    @property
    def plain(self) -> Arm:
        """Without what does not matter: settings of a recipe where there is none."""
        if self.has_recipe:
            return self
        said = ["sparse", "wide", "lr", "seed", "precision", "tokens", "size", "optimizer"]
        kept = {key: getattr(self, key) for key in [*said, *(["operand"] if self.sparse else [])]}
        return Arm(self.name, self.activation, dense=0.0 if self.sparse else Arm.dense, **kept)

    @property
    def has_recipe(self) -> bool:
        return self.sparse and self.operand == "weight"

    @property
    def layers(self) -> str:
        """What its feed-forward layers are: dense, or which operand is 2:4."""
        return self.operand if self.sparse else "dense"

    @property
    def is_dense_16_bit(self) -> bool:
        """What others are compared with, at width 1 and its best rate."""
        return not self.sparse and not self.precision

    @property
    def family(self) -> tuple[str, str, str, str]:
        """What arms must share to be compared: activation, size, tokens of a step, optimizer."""
        return self.activation, self.size, self.tokens, self.optimizer

    @property
    def micro_batches(self) -> int:
        return TOKENS[self.tokens]

    @property
    def gated(self) -> bool:
        return self.activation == "swiglu"

    def d_ff(self, width: int) -> int:
        return round(4 * self.wide * width * (2 / 3 if self.gated else 1) / 64) * 64

    @property
    def group(self) -> str:
        """The name without its seed, and without what is so by default: arms to be averaged."""
        return " ".join(part for part in self.spelled.split() if not part.startswith("seed="))

    @property
    def spelled(self) -> str:
        """The one spelling of arms that are equal."""
        arm, kind = self.plain, "2:4" if self.sparse else "dense"
        own = (f for f in fields(Arm)[3:] if f.name != "dense" or arm.operand == "weight")
        said = [f for f in own if f.name == "seed" or getattr(arm, f.name) != f.default]
        return " ".join([arm.activation, kind, *(f"{f.name}={text_of(getattr(arm, f.name))}" for f in said)])

    @property
    def slug(self) -> str:
        return self.spelled.translate(str.maketrans({" ": "_", "/": "-", "=": "-", ":": "-"}))


def parse(name: str) -> Arm:
    """`ACTIVATION dense|2:4 [key=value ...]` -> Arm. Raises ValueError for anything else."""
    activation, kind, *settings = name.split()
    if activation not in ACTIVATIONS or kind not in ("dense", "2:4"):
        raise ValueError(f"an arm begins with {', '.join(ACTIVATIONS)}, then dense or 2:4, got {name!r}")
    values = dict(setting.split("=") for setting in settings)
    if unknown := values.keys() - {f.name for f in fields(Arm)[3:]}:
        raise ValueError(f"an arm has no setting {', '.join(sorted(unknown))}: {name!r}")
    for key, known in CHOICES.items():
        if values.get(key, next(iter(known))) not in known:
            raise ValueError(f"{key} must be one of {', '.join(known)}: {name!r}")
    if values.get("optimizer") == "muon":
        values.setdefault("decay", "1")
    arm = Arm(name, activation, kind == "2:4", **{key: _value(key, text) for key, text in values.items()})
    if arm.precision not in ("", *PRECISIONS[arm.layers]):
        raise ValueError(f"precision must be one of {', '.join(PRECISIONS[arm.layers])} here: {name!r}")
    if arm.precision and arm.has_recipe and arm.mvue in ("h", "input", "auto"):
        raise ValueError(f"8-bit layers prune output gradients alone: write mvue=True or mvue=False in {name!r}")
    return arm


def _value(key: str, text: str):
    kind = Arm.__dataclass_fields__[key].type
    return {"int": int, "float": lambda text: float(Fraction(text))}.get(kind, str)(text)


def text_of(value: object) -> str:
    """As names have it: 2/3 and 1.375, 6e-3."""
    if not isinstance(value, float):
        return str(value)
    if 0 < value < 0.1:
        mantissa, exponent = f"{value:.3e}".split("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    near = Fraction(value).limit_denominator(9)
    return str(near) if float(near) == value and near.denominator in (3, 6, 7, 9) else f"{value:g}"


def mvue_of(arm: Arm) -> bool | str:
    return {"True": True, "False": False, "h": True}.get(arm.mvue, arm.mvue)
