"""The training methods behind one interface, and what each asks of the recipe.

fst     the paper's (arXiv 2404.01847): masked decay on gradients, dense at the end
ste     straight-through alone: no decay
sr-ste  the decay on the weights instead (arXiv 2102.04010), dense at the end
step    dense first, until Adam's second moment has settled; then that is frozen and training is sparse
        (arXiv 2302.01172)
s-ste   soft threshold instead of a mask (arXiv 2409.09099): row-wise 2:4, scaled once, no decay, no dense phase; its
        input gradient is a dense product (sparse24/functional/soft.py)
mvue    dense weights, sparse weight gradients: no mask, no decay, no phase. Unbiased at every step, so it fits the
        fine-tuning of any pretrained model; its noise acts like a smaller batch
dense   trains dense and only looks: masks are searched, so that flip rates can be compared, and not applied
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import Sparse24Error


@dataclass(frozen=True)
class Method:
    name: str
    decay_on: str | None  # "gradient", "weight" or None
    dense_at: str  # "start", "end" or "none": where the dense steps are by default
    soft: bool = False
    freezes_second_moment: bool = False
    watches: bool = False  # masks are searched and not applied
    gradients_only: bool = False  # dense weights, no masks at all


METHODS = {
    method.name: method
    for method in (
        Method("fst", decay_on="gradient", dense_at="end"),
        Method("ste", decay_on=None, dense_at="end"),
        Method("sr-ste", decay_on="weight", dense_at="end"),
        Method("step", decay_on=None, dense_at="start", freezes_second_moment=True),
        Method("s-ste", decay_on=None, dense_at="none", soft=True),
        Method("mvue", decay_on=None, dense_at="none", gradients_only=True),
        Method("dense", decay_on=None, dense_at="none", watches=True),
    )
}


MVUE = (True, False, None, "output", "input", "auto")


def check_mvue(mvue, method: Method) -> None:
    """Raises Sparse24Error for an mvue that no method takes, or that this one does not."""
    if not any(mvue is choice or (isinstance(mvue, str) and mvue == choice) for choice in MVUE):
        raise Sparse24Error(f'mvue must be True, False, None, "output", "input" or "auto", got {mvue!r}')
    if mvue in ("input", "auto") and method.soft:
        raise Sparse24Error(f'mvue={mvue!r} is not available with method={method.name!r}; use mvue="output" or False')


# -- STEP -----------------------------------------------------------------------------------------------------------


class FrozenSecondMoment:
    """Keeps what Adam divides by, for some parameters, at the value it had when this object was made.

    Adam divides by the root of v / (1 - beta2^t). An optimizer gives no way to switch its average off (beta2 = 1 also
    switches bias correction to 0 / 0), so before each step the state is set such that the step's own update,
    v <- beta2 v + (1 - beta2) g^2, arrives at the frozen value times the correction of that step. With v alone held,
    the divisor would still shrink, by a factor of 3 in all after 100 steps at beta2 = 0.999.

    frozen       the second moments as they were frozen, not corrected for their bias
    corrections  1 - beta2^t at that time, one for each parameter; 1 where the optimizer does not correct. Older states
                 have none: the divisor stays what it is at the first step, once the optimizer has its state again
    """

    KEY = "exp_avg_sq"

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        parameters: Iterable[Tensor],
        frozen: list[Tensor] | None = None,
        corrections: list[float] | None = None,
    ):
        self.optimizer = optimizer
        self.parameters = list(parameters)
        self._groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
        self.check(optimizer, self.parameters)
        if frozen is not None:
            self.frozen = [f.to(p.device, copy=True) for f, p in zip(frozen, self.parameters, strict=True)]
            self.corrections = list(corrections or [])
        else:
            self.frozen = [self._moment(p).clone() for p in self.parameters]
            self.corrections = self._present_corrections()

    @classmethod
    def check(cls, optimizer: torch.optim.Optimizer, parameters: Iterable[Tensor]) -> None:
        """Raises Sparse24Error for an optimizer that is not Adam, or keeps the largest second moment instead.

        Others, such as Lion, have betas too: what they keep shows in their state, once they have taken a step.
        """
        if not all("betas" in group and not group.get("amsgrad", False) for group in optimizer.param_groups):
            raise Sparse24Error(
                f"method='step' freezes Adam's second moment; {type(optimizer).__name__} has no betas, or uses "
                "amsgrad; use Adam or AdamW without amsgrad, or another method"
            )
        states = filter(None, map(optimizer.state.get, parameters))
        if isinstance(optimizer, torch.optim.Adamax) or any(cls.KEY not in state for state in states):
            raise Sparse24Error(
                f"method='step' freezes Adam's second moment, which {type(optimizer).__name__} does not keep as "
                f"{cls.KEY!r}; use Adam or AdamW, or another method"
            )

    def _moment(self, p: Tensor) -> Tensor:
        moment = self.optimizer.state.get(p, {}).get(self.KEY)
        return torch.zeros_like(p) if moment is None else moment

    def _correction(self, p: Tensor, ahead: int) -> float | Tensor:
        """1 - beta2^t, `ahead` steps after those taken; on the device where the optimizer counts there."""
        group = self._groups[id(p)]
        taken = self.optimizer.state.get(p, {}).get("step", group.get("step"))  # some count for a whole group
        if taken is None or not group.get("bias_correction", group.get("correct_bias", True)):
            return 1.0
        on_device = isinstance(taken, Tensor) and taken.device.type != "cpu"
        return 1 - float(group["betas"][1]) ** ((taken.double() if on_device else float(taken)) + ahead)

    def _present_corrections(self) -> list[float]:
        return [float(self._correction(p, 0)) or 1.0 for p in self.parameters]  # 0: not stepped, and so is its moment

    def _targets(self, ahead: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """(parameter, its second moment, the value to hold) of those that have been stepped."""
        self.corrections = self.corrections or self._present_corrections()
        for p, frozen, correction in zip(self.parameters, self.frozen, self.corrections, strict=True):
            moment = self.optimizer.state.get(p, {}).get(self.KEY)
            if moment is not None:
                yield p, moment, frozen * (self._correction(p, ahead) / correction)

    @torch.no_grad()
    def before_step(self) -> None:
        for p, moment, target in self._targets(1):
            if p.grad is None:
                continue
            group = self._groups[id(p)]
            beta2 = group["betas"][1]
            grad = p.grad
            scale = getattr(self.optimizer, "grad_scale", None)
            if scale is not None:
                grad = grad / scale
            is_decoupled = group.get("decoupled_weight_decay", type(self.optimizer).__name__ != "Adam")
            if group.get("weight_decay", 0) and not is_decoupled:
                grad = grad + group["weight_decay"] * p  # Adam's L2 term enters g before the average does
            update = (1 - beta2) * grad.to(moment.dtype).square()
            # Rounding must not leave the result below 0, where the optimizer takes a root.
            moment.copy_(torch.maximum(target - update, update * (1e-6 - 1)) / beta2)

    @torch.no_grad()
    def after_step(self) -> None:
        """Put the exact value back: rounding must not add up, and a skipped step has moved nothing."""
        for _, moment, target in self._targets(0):
            moment.copy_(target)
