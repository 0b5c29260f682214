"""Base linears whose weight lies in panels."""

from typing import Any

import torch
from torch import Tensor

from tucka_runtime.kernels.native import library
from tucka_runtime.kernels.ops import Linear
from tucka_runtime.kernels.reference.linear import linear as torch_linear
from tucka_runtime.kernels.reference.linear import packable


class PanelLinear:
    """ops.Linear in C++, whose weight lies as linear.cpp lays it out.

    A row of y does not depend on how many others there are, to the bit."""

    __slots__ = ("_native", "_panels", "bias", "shape")

    def __init__(self, weight: Tensor, bias: Tensor | None):
        self.shape = weight.shape
        self.bias = bias
        self._native: Any = library.module()
        self._panels: Tensor = self._native.pack(weight)

    def __call__(self, x: Tensor) -> Tensor:
        y: Tensor = self._native.linear(x, self._panels, self.bias, self.shape[0])
        return y

    def wide(self, x: Tensor) -> Tensor:
        """The same y, in fp32."""
        y: Tensor = self._native.linear_wide(x, self._panels, self.bias, self.shape[0])
        return y

    def dense(self) -> Tensor:
        """A copy of the weight (out, in) as it was given."""
        weight: Tensor = self._native.unpack(self._panels, *self.shape)
        return weight


def linear(weight: Tensor, bias: Tensor | None) -> Linear:
    """ops.MakeLinear. These products are faster than oneDNN's: with AVX2, in bf16 where the CPU multiplies it, and in fp32
    with AVX512 for up to 8 rows, while more take up to a tenth longer. Where oneDNN has no products of a type, they are
    many times faster than torch's (docs/measurements/cpu-linear-2026-11-26.md, cpu-linear-2026-11-27.md)."""
    known = {"AVX2": True, "AVX512": weight.dtype == torch.float32, "AVX512_BF16": True}
    if weight.dim() == 2 and (known.get(library.load() or "", False) or not packable(weight)):
        return PanelLinear(weight, bias)
    return torch_linear(weight, bias)
