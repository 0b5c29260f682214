"""Base linears: the weight is packed for oneDNN where that is on a CPU, as it is elsewhere."""

import torch
from torch import Tensor
from torch.nn import functional

from tucka_runtime.kernels.ops import Linear

PACKED_ROWS = 8
"""Rows that oneDNN packs the weight for. A small batch gains most and a large one loses nothing; measured on one core
(AVX512-BF16), (32000, 512) bf16: 8 rows 4.6 -> 2.1 ms, 512 rows 83 -> 79 ms; (1024, 512): 81 -> 56 us, 2390 -> 2412 us.
"""


def packable(weight: Tensor) -> bool:
    """Whether oneDNN packs a weight of this type here: bf16 only where the CPU multiplies it."""
    if weight.dim() != 2 or weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    if weight.dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return weight.dtype == torch.float32


class TorchLinear:
    """ops.Linear by torch. Packing changes no bit of y in bf16."""

    __slots__ = ("_weight", "bias", "shape")

    def __init__(self, weight: Tensor, bias: Tensor | None):
        self.shape = weight.shape
        self.bias = bias
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight, PACKED_ROWS) if packable(weight) else weight

    def __call__(self, x: Tensor) -> Tensor:
        if self._weight.is_mkldnn:
            y: Tensor = torch.ops.mkldnn._linear_pointwise(x, self._weight, self.bias, "none", [], "")
            return y
        return functional.linear(x, self._weight, self.bias)

    def wide(self, x: Tensor) -> Tensor:
        """The same y, in fp32."""
        return self(x).float()

    def dense(self) -> Tensor:
        """The weight (out, in) as it was given; a copy where it is packed."""
        return self._weight.to_dense() if self._weight.is_mkldnn else self._weight


def linear(weight: Tensor, bias: Tensor | None) -> Linear:
    """ops.MakeLinear."""
    return TorchLinear(weight, bias)
