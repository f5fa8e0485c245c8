"""What two right ways of computing one thing may differ by, derived once for the tests that share it.

EPS is the unit in the last place of 1. A sum of k terms in fp32 lies within k EPS / 2 of the exact one, counted in the
sum of their magnitudes, whatever their order; two orders lie within k EPS of each other. The layers of these tests are
at most 64 wide, of values and sums of magnitudes around 1.
"""

import torch

EPS = torch.finfo(torch.float32).eps
EPS16 = torch.finfo(torch.bfloat16).eps

#: of two orders of one sum, as a share of its magnitudes
ORDER = 64 * EPS
#: one layer or block
ANOTHER_ORDER = dict(rtol=ORDER, atol=ORDER)
#: Up to sixteen such sums, each of which carries on the error of those before: layers on top of one another, or steps
#: of an optimizer. Adam divides a gradient by its size, so what comes of its error is a share of the learning rate,
#: at most 0.1 here: near zero that leaves a tenth, and twice so for its two moments.
MANY_SUMS = dict(rtol=16 * ORDER, atol=2 * ORDER)
#: four roundings to bf16 of values around 1, of operand, hidden layer, output and gradient: half a unit on either side
ROUNDED_TO_16 = dict(rtol=4 * EPS16, atol=4 * EPS16)
