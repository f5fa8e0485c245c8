"""Named settings of a recipe, each with what it was found to cost.

Figures: a GPT of 10.6 M parameters besides its embeddings, 161 M tokens of fresh text, 32k tokens a step, AdamW; the
loss against that of a dense FFN of the same width at the same number of steps, each at its best learning rate,
simulated in plain PyTorch. A run of another size or length will differ; the order of the settings should not.

paper       arXiv 2404.01847: masked decay in gradients, masks searched every 40 steps, dense for the last sixth. +1.0 %
            with GELU: level with a dense FFN of 2/3 of the width, which takes as long as the 2:4 layer does at 1.5x
equal-time  the same, dense for the last third, and the weight gradients pruned in the operand that adds less noise: h,
            not dy, in down products. +0.5 % with squared ReLU. The same over layers 1.5x as wide in squared ReLU, which
            take as long as the dense ones where 2:4 runs at 1.5x, was 0.23 % *better* than dense. So: widen the layer
            by what 2:4 gains in time, use squared ReLU where the model is yours to choose, and look for the learning
            rate anew, since 2:4 arms like a higher one than dense
fine-tune   dense weights, sparse weight gradients (`method="mvue"`): no mask, so a pretrained model keeps its function.
            +0.26 % at 32k tokens a step and +0.14 % at 131k
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from ..errors import Sparse24Error


@dataclass(frozen=True)
class Preset:
    """Values for the settings of `Recipe` that are left out."""

    decay: float = 6e-5
    mask_interval: int = 40
    dense_fraction: float = 1 / 6
    mvue: bool | str | None = None
    method: str = "fst"
    decay_schedule: str = "constant"
    dense_at: str = "auto"


PRESETS = {
    "paper": Preset(),
    "equal-time": Preset(dense_fraction=1 / 3, mvue="auto"),
    "fine-tune": Preset(method="mvue", dense_fraction=0.0, mvue=True),
}


def filled(preset: str, given: dict) -> Preset:
    """The settings of `preset` with those of `given` that are not None in their place."""
    if preset not in PRESETS:
        raise Sparse24Error(f"preset must be one of {', '.join(PRESETS)}, got {preset!r}")
    names = {field.name for field in fields(Preset)}
    return Preset(**(vars(PRESETS[preset]) | {k: v for k, v in given.items() if k in names and v is not None}))
