"""The base's linears, as what folding asks of them."""

from collections.abc import Iterable

import torch
from torch import Tensor

from tucka_runtime.engine.adapters.folded import Where
from tucka_runtime.models.architecture import Architecture
from tucka_runtime.models.weights import Weights


class BaseLinears:
    """The base's own linears, of which adapters ask site by site: a site's weights are unpacked once."""

    def __init__(self, arch: Architecture, weights: Weights):
        self.arch = arch
        self.weights = weights
        self._unpacked: tuple[tuple[int, int], Tensor] | None = None

    def _columns(self, at: Where) -> slice:
        site = self.arch.sites[at.site]
        return slice(site.columns[at.target], site.columns[at.target + 1])

    def width(self, at: Where) -> int:
        """d_out."""
        return self.arch.sites[at.site].widths[at.target]

    def by_site(self, where: Iterable[Where]) -> list[list[Where]]:
        """The linears site by site."""
        sites: dict[tuple[int, int], list[Where]] = {}
        for at in where:
            sites.setdefault((at.layer, at.site), []).append(at)
        return list(sites.values())

    def products(self, site: list[Where], rows: list[Tensor]) -> list[Tensor]:
        """x Wᵀ (r, d_out) fp32 of rows x (r, d_in) fp32 of each of a site's linears."""
        linear = self.weights.layers[site[0].layer].linears[site[0].site]
        columns = [self._columns(at) for at in site]
        if linear.bias is None and self.weights.embed.dtype == torch.float32:
            # As it is packed: a copy would push the weights that steps read out of the cache.
            parts = linear(torch.cat(rows)).split([len(x) for x in rows])
            return [part[:, own] for part, own in zip(parts, columns, strict=True)]
        weight = linear.dense()
        return [x @ weight[own].float().T for x, own in zip(rows, columns, strict=True)]

    def weight(self, at: Where) -> Tensor:
        """(d_out, d_in) fp32."""
        site = at.layer, at.site
        if self._unpacked is None or self._unpacked[0] != site:
            self._unpacked = site, self.weights.layers[at.layer].linears[at.site].dense()
        return self._unpacked[1][self._columns(at)].float()

    def bias(self, at: Where) -> Tensor:
        """(d_out,) fp32, zero where the base has none."""
        columns, bias = self._columns(at), self.weights.layers[at.layer].linears[at.site].bias
        if bias is None:
            return torch.zeros(columns.stop - columns.start, device=self.weights.embed.device)
        return bias[columns].float()
