"""Base linears whose weight lies in panels, in the order in which linear.cpp reads it."""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from tucka_runtime.kernels.native import library
from tucka_runtime.kernels.ops import Linear
from tucka_runtime.kernels.reference.linear import linear as torch_linear
from tucka_runtime.kernels.reference.linear import packable

_NATIVE: Any = torch.ops.tucka


class PanelLinear:
    """ops.Linear in C++. The panels are (N, in, P) in the weight's own type, P rows of the weight in each and zeros
    behind the last: [n, k, c] = W[n·P + c, k]. In bf16 the rows c and c + P/2 lie side by side (linear.cpp says why).

    A row of y does not depend on how many others there are, to the bit."""

    __slots__ = ("_panels", "bias", "shape")

    def __init__(self, weight: Tensor, bias: Tensor | None):
        self.shape = weight.shape
        self.bias = bias
        size = _NATIVE.panel()
        missing = -len(weight) % size
        whole = pad(weight, (0, 0, 0, missing)) if missing else weight
        if weight.dtype == torch.bfloat16:
            split = whole.view(-1, 2, size // 2, weight.shape[1])
            self._panels = split.permute(0, 3, 2, 1).contiguous().flatten(2)
        else:
            self._panels = whole.view(-1, size, weight.shape[1]).permute(0, 2, 1).contiguous()

    def __call__(self, x: Tensor) -> Tensor:
        y: Tensor = _NATIVE.linear(x, self._panels, self.bias, self.shape[0])
        return y

    def dense(self) -> Tensor:
        """A copy of the weight (out, in) as it was given."""
        count, d_in, size = self._panels.shape
        if self._panels.dtype == torch.bfloat16:
            rows = self._panels.view(count, d_in, size // 2, 2).permute(0, 3, 2, 1)
        else:
            rows = self._panels.permute(0, 2, 1)
        return rows.reshape(-1, d_in)[: self.shape[0]].contiguous()


def linear(weight: Tensor, bias: Tensor | None) -> Linear:
    """ops.MakeLinear. With AVX2 these products are faster than oneDNN's, and where the CPU has no products of a type
    many times faster than torch's (docs/measurements/cpu-linear-2026-11-26.md); with more, oneDNN's are taken for what
    it packs, for ours were not measured there."""
    if weight.dim() == 2 and (library.load() == "AVX2" or not packable(weight)):
        return PanelLinear(weight, bias)
    return torch_linear(weight, bias)
