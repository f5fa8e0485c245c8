"""Named settings of a recipe, each with what it was found to cost.

paper       arXiv 2404.01847: masked decay in gradients, masks searched every 40 steps, dense for the last sixth
equal-time  the same, dense for the last third, and the weight gradients pruned in the operand that adds less noise: h,
            not dy, in down products (so from the first step on, where figures are given)
fine-tune   dense weights, sparse weight gradients (`method="mvue"`): no mask, so a pretrained model keeps its function

    settings                                 FFN width   validation loss   FFN time   seeds
    paper                                        1          +1.2 %           0.71       1
    a dense layer, to compare with              2/3         +1.3 %           0.67       1
    equal-time                                   1          +0.6 %           0.77       3
    equal-time                                 1.25         +0.1 %           0.96       3
    equal-time                                 1.375        -0.05 %          1.05       1
    equal-time, dense for the last sixth       1.375        +0.1 %           0.97       3
    fine-tune                                    1          +0.95 %           -         1
    fine-tune, simulated, 32k tokens a step      1          +0.26 %           -
    fine-tune, simulated, 131k tokens a step     1          +0.14 %           -
    no recipe: sparsify(operand="activation")   4/3         -0.15 %          0.97       3

Loss and time are over dense of width 1, for a GPT with squared ReLU and 10.6 M parameters besides its embeddings, after
160 M tokens of fresh text, 32k tokens a step, with the real kernels (docs/results/quality.md). Dense and 2:4
activations had a learning rate of 2e-3 and the rest 3e-3: of those tried the better for each. The time is that of its
feed-forward layers, if they had a realistic size and 2:4 were 1.54x as fast (activations: 1.37x). Figures will differ
for other sizes and lengths; the order of the settings should not. So widen the layer by what 2:4 gains in time, and
where the model is yours to choose, use squared ReLU and 2:4 activations (docs/sparse-activations.md).
"""

from __future__ import annotations

from dataclasses import dataclass, replace


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


def filled(preset: str, **given) -> Preset:
    """The settings of `preset` with those that are given, and not None, in their place."""
    return replace(PRESETS[preset], **{name: value for name, value in given.items() if value is not None})
