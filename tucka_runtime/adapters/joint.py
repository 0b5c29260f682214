"""Joint diagonalisation: many low-rank changes of one linear over one pair of factors, and a small core each.

Compress-then-Serve (arXiv 2407.00066): of changes Δ_i = B_i A_i, each brought to Frobenius norm 1, it lowers

    Σ_i ‖Δ_i − U S_i V‖²        U (d_out, R) with orthonormal columns, V (R, d_in) with orthonormal rows

block by block. Of given U and V the best S_i is Uᵀ Δ_i Vᵀ, or its diagonal; of given V and S_i the best U is the
orthogonal factor of Σ_i Δ_i Vᵀ S_iᵀ (Procrustes), and V likewise. No step can raise the sum. With full cores the two
steps are orthogonal iteration on Σ_i Δ_i VᵀV Δ_iᵀ, and what they find is the best pair where R spans all changes.
Everything is in float64, and no Δ_i is ever made.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

MAX_STEPS = 500
LEAST_GAIN = 1e-7
"""The rounds end where one lowers the mean squared relative error by less."""


@dataclass(frozen=True, eq=False)
class Joint:
    """What `diagonalise` found, float64: u (d_out, R), cores (N, R, R), or (N, R) where they are diagonal, and v
    (R, d_in). `losses` are the mean squared relative errors after each round."""

    u: Tensor
    cores: Tensor
    v: Tensor
    losses: tuple[float, ...]


def diagonalise(b: Tensor, a: Tensor, rank: int, diagonal: bool) -> Joint:
    """One basis for N changes b[i] @ a[i], of b (N, d_out, r) and a (N, r, d_in), and the core of each in it.

    It is exact where `rank` is the sum of their ranks or more and the cores are full. A change of zeros gets a core of
    zeros; columns of the basis that nothing needs are zeros.
    """
    b, a = b.double(), a.double()
    norms = norm_of_product(b, a)
    b_unit = b / norms.where(norms > 0, 1)[:, None, None]
    left, right = _span(b_unit), _span(a.mT)
    family = _Family(b_unit if left is None else left.T @ b_unit, a if right is None else a @ right)
    sides = family.b.shape[1], family.a.shape[2]
    u_size, v_size = min(rank, sides[0]), min(rank, sides[1])
    u, v, losses = family.full(u_size, v_size)
    if diagonal:
        size = min(u_size, v_size)
        u, v = family.rotated(u, v)
        u, v, losses = family.improve(u[:, :size], v[:, :size], diagonal=True)
    cores = family.cores(u, v, diagonal) * norms.view(-1, *[1] * (1 if diagonal else 2))
    u, v = (own if span is None else span @ own for own, span in ((u, left), (v, right)))
    missing = [0, rank - cores.shape[-1]] + ([] if diagonal else [0, rank - cores.shape[-2]])
    return Joint(_widened(u, rank), torch.nn.functional.pad(cores, missing), _widened(v, rank).T, losses)


def norm_of_product(b: Tensor, a: Tensor) -> Tensor:
    """‖b[i] @ a[i]‖ (N,) of b (N, d_out, r) and a (N, r, d_in), to the last digits also where it is nearly nothing."""
    left, right = torch.linalg.qr(b, mode="r")[1], torch.linalg.qr(a.mT, mode="r")[1]
    norms: Tensor = torch.linalg.matrix_norm(left @ right.mT)
    return norms


def relative_errors(b: Tensor, a: Tensor, u: Tensor, cores: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """‖b[i] @ a[i] − u cores[i] v‖ and ‖b[i] @ a[i]‖, (N,) each, in float64 whatever the arguments are in."""
    b, a, u, cores, v = (x.double() for x in (b, a, u, cores, v))
    full = torch.diag_embed(cores) if cores.dim() == 2 else cores
    left = torch.cat([b, -(u @ full)], dim=2)
    right = torch.cat([a, v.expand(len(a), *v.shape)], dim=1)
    return norm_of_product(left, right), norm_of_product(b, a)


@dataclass(frozen=True, eq=False)
class _Family:
    """The changes in the coordinates of what they span: b (N, m, r) and a (N, r, n)."""

    b: Tensor
    a: Tensor

    def full(self, u_size: int, v_size: int) -> tuple[Tensor, Tensor, tuple[float, ...]]:
        """U (m, u_size), V (n, v_size) and the losses with full cores."""
        random = torch.Generator().manual_seed(0)
        start = torch.randn(self.a.shape[2], v_size, generator=random, dtype=torch.float64)
        # As if V were everything: the leading directions of all changes side by side.
        seed = torch.randn(self.b.shape[1], u_size, generator=random, dtype=torch.float64)
        for _ in range(2):
            seed = _orthogonal(self._left(self.a @ self.a.mT @ (self.b.mT @ seed)))
            start = _orthogonal(self._right(self.b.mT @ self.b @ (self.a @ start)))
        return self.improve(seed, start, diagonal=False)

    def rotated(self, u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """The same spaces by their leading directions: where changes share singular vectors, or their spaces are
        orthogonal to each other, those are the columns under which every core is diagonal."""
        cores = self.cores(u, v, diagonal=False)
        own_u = torch.linalg.eigh((cores @ cores.mT).sum(0))[1].flip(1)
        own_v = torch.linalg.eigh((cores.mT @ cores).sum(0))[1].flip(1)
        return u @ own_u, v @ own_v

    def improve(self, u: Tensor, v: Tensor, diagonal: bool) -> tuple[Tensor, Tensor, tuple[float, ...]]:
        """Rounds of the three steps until they bring nothing."""
        losses = [self.loss(u, v, diagonal)]
        for _ in range(MAX_STEPS):
            cores = self.cores(u, v, diagonal)
            u = _orthogonal(self._left(_times(self.a @ v, cores.mT if not diagonal else cores)))
            cores = self.cores(u, v, diagonal)
            v = _orthogonal(self._right(_times(self.b.mT @ u, cores)))
            losses.append(self.loss(u, v, diagonal))
            if losses[-2] - losses[-1] < LEAST_GAIN:
                break
        return u, v, tuple(losses)

    def cores(self, u: Tensor, v: Tensor, diagonal: bool) -> Tensor:
        """The best core of each change: (N, u's, v's), or (N, R)."""
        left, right = self.b.mT @ u, self.a @ v
        return (left * right).sum(1) if diagonal else left.mT @ right

    def loss(self, u: Tensor, v: Tensor, diagonal: bool) -> float:
        """The mean of 1 − ‖S_i‖², which is what is lost of changes of norm 1."""
        kept = self.cores(u, v, diagonal).flatten(1).square().sum(1)
        return float((1 - kept).mean())

    def _left(self, x: Tensor) -> Tensor:
        """Σ_i b_i x_i of x (N, r, R)."""
        return torch.einsum("nmr,nrk->mk", self.b, x)

    def _right(self, x: Tensor) -> Tensor:
        """Σ_i a_iᵀ x_i of x (N, r, R)."""
        return torch.einsum("nrm,nrk->mk", self.a, x)


def _times(x: Tensor, cores: Tensor) -> Tensor:
    """x_i S_i of x (N, r, R) and full or diagonal cores."""
    return x * cores[:, None] if cores.dim() == 2 else x @ cores


def _orthogonal(x: Tensor) -> Tensor:
    """The nearest matrix with orthonormal columns."""
    left, _, right = torch.linalg.svd(x, full_matrices=False)
    nearest: Tensor = left @ right
    return nearest


def _span(columns: Tensor) -> Tensor | None:
    """Orthonormal columns that span all of columns (N, d, r); None where they may be as many as d."""
    count, d, r = columns.shape
    if count * r >= d:
        return None
    stacked = columns.transpose(0, 1).reshape(d, count * r)
    span: Tensor = torch.linalg.qr(stacked[:, stacked.any(0)])[0]
    return span


def _widened(x: Tensor, rank: int) -> Tensor:
    return torch.nn.functional.pad(x, [0, rank - x.shape[1]])
