"""Elementwise functions whose result does not depend on a number's position in the tensor.

torch computes `pow`, `sigmoid`, `silu` and `gelu` with vector instructions, and the remaining
numbers at the end of a tensor with scalar code that rounds differently. The last bit of a row would
therefore depend on the other rows of the batch, and so would its tokens if a threshold equals that
value. Here the functions are composed of additions, multiplications, divisions and bit operations
in float64, for which IEEE 754 defines the rounding whatever the layout. The result is rounded to
the input's dtype at the end. Its relative error is below 1e-9; rounding to float32 alone has an
error of up to 6e-8.

torch's `exp`, `log`, `softmax`, `layer_norm`, sums over the last dimension and sines do not depend
on the layout (tests check this), and are used unchanged.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_LN2_HIGH = 0.693147180369123816490
"""The high digits of log 2: few enough that a product with the exponent of a float64 is exact."""
_LN2_LOW = 1.90821492927058770002e-10
_BIAS, _MANTISSA = 1023, 52
_LEAST = 2.0**-1022
"""The smallest normal float64."""


def sigmoid(x: Tensor) -> Tensor:
    """1 / (1 + e^-x)."""
    return (1 / (1 + _exp(-x.double()))).to(x.dtype)


def power(x: Tensor, exponent: float) -> Tensor:
    """x^exponent, both at least 0; 0^0 is 1."""
    wide = x.double()
    made = _exp(exponent * _log(wide.clamp(min=_LEAST)))
    made = torch.where(wide == 0, float(exponent == 0), made)
    return torch.where(wide.isnan(), wide, made).to(x.dtype)


def silu(x: Tensor) -> Tensor:
    """x / (1 + e^-x)."""
    wide = x.double()
    return (wide / (1 + _exp(-wide))).to(x.dtype)


def gelu(x: Tensor) -> Tensor:
    """x times the probability that a standard normal number is below x."""
    wide = x.double()
    z = (wide / math.sqrt(2)).clamp(-4.5, 4.5)
    # erf z = 2 z / sqrt(pi) e^-z^2 (1 + 2 z^2 / 3 (1 + 2 z^2 / 5 (1 + ...))), all terms positive.
    square = 2 * z * z
    series = torch.ones_like(z)
    for n in range(141, 1, -2):
        series = series * square / n + 1
    erf = 2 / math.sqrt(math.pi) * z * _exp(-z * z) * series
    erf = torch.where(z.abs() < 4.5, erf, z.sign())
    return (wide * (1 + erf) / 2).to(x.dtype)


def _exp(x: Tensor) -> Tensor:
    """float64 -> float64; clamped to e^-708 and e^709."""
    x = x.clamp(-708.0, 709.0)
    power = (x / math.log(2)).round()
    rest = (x - power * _LN2_HIGH) - power * _LN2_LOW  # at most half of log 2
    series = torch.full_like(rest, 1 / math.factorial(10))
    for n in range(9, -1, -1):
        series = series * rest + 1 / math.factorial(n)
    bits = (power.nan_to_num().long() + _BIAS) << _MANTISSA
    return series * bits.view(torch.float64)


def _log(x: Tensor) -> Tensor:
    """float64 -> float64, of positive numbers."""
    bits = x.view(torch.int64)
    exponent = (bits >> _MANTISSA) - _BIAS
    mantissa = ((bits & ((1 << _MANTISSA) - 1)) | (_BIAS << _MANTISSA)).view(torch.float64)
    high = mantissa > math.sqrt(2)
    mantissa = torch.where(high, mantissa / 2, mantissa)  # from sqrt(1/2) to sqrt(2)
    power = (exponent + high).double()
    # log m = 2 (s + s^3 / 3 + s^5 / 5 + ...) with s = (m - 1) / (m + 1), at most 0.172.
    s = (mantissa - 1) / (mantissa + 1)
    square = s * s
    series = torch.full_like(s, 1 / 15)
    for n in range(13, 0, -2):
        series = series * square + 1 / n
    return power * _LN2_HIGH + (2 * s * series + power * _LN2_LOW)
