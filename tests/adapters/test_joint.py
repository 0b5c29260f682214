"""Joint diagonalisation against its definition: products in float64, the sum that it lowers, the best pair there is."""

import pytest
import torch

from tucka_runtime.adapters.joint import diagonalise, norm_of_product, relative_errors

D_OUT, D_IN = 30, 40


def family(count: int, r: int = 3, d_out: int = D_OUT, d_in: int = D_IN, seed: int = 0):
    """Changes of sizes that differ by orders of magnitude."""
    random = torch.Generator().manual_seed(seed)
    b = torch.randn(count, d_out, r, generator=random, dtype=torch.float64)
    a = torch.randn(count, r, d_in, generator=random, dtype=torch.float64)
    return b * torch.logspace(-3, 3, count, dtype=torch.float64)[:, None, None], a


def rebuilt(joint):
    cores = torch.diag_embed(joint.cores) if joint.cores.dim() == 2 else joint.cores
    return joint.u @ cores @ joint.v


def lost(b, a, joint):
    """The mean squared relative error, of the products themselves."""
    want = b @ a
    return ((want - rebuilt(joint)).norm(dim=(1, 2)) / want.norm(dim=(1, 2))).square().mean()


@pytest.mark.parametrize(("count", "rank"), [(4, 12), (4, 16), (1, 3), (20, 40), (20, 64)])
def test_a_rank_of_all_together_loses_nothing(count, rank):
    b, a = family(count)
    joint = diagonalise(b, a, rank, diagonal=False)
    assert joint.u.shape == (D_OUT, rank) and joint.v.shape == (rank, D_IN) and joint.cores.shape == (count, rank, rank)
    want = b @ a
    errors = (want - rebuilt(joint)).norm(dim=(1, 2)) / want.norm(dim=(1, 2))
    assert errors.max() < 1e-12


@pytest.mark.parametrize("diagonal", [False, True])
@pytest.mark.parametrize(("count", "rank", "d_out"), [(12, 8, 30), (30, 6, 30), (9, 6, 4)])
def test_factors_are_orthonormal_and_no_round_loses_more(diagonal, count, rank, d_out):
    b, a = family(count, d_out=d_out)
    joint = diagonalise(b, a, rank, diagonal)
    own = min(rank, d_out)
    eye = torch.eye(own, dtype=torch.float64)
    torch.testing.assert_close(joint.u[:, :own].T @ joint.u[:, :own], eye)
    torch.testing.assert_close((joint.v @ joint.v.T)[:own, :own], eye)
    assert len(joint.losses) > 2
    assert all(later <= earlier + 1e-12 for earlier, later in zip(joint.losses, joint.losses[1:], strict=False))
    torch.testing.assert_close(float(lost(b, a, joint)), joint.losses[-1])


def test_one_change_gets_its_best_approximation():
    b, a = family(1, r=8)
    values = torch.linalg.svdvals(b[0] @ a[0])
    best = values[5:].square().sum() / values.square().sum()
    for diagonal in (False, True):
        torch.testing.assert_close(lost(b, a, diagonalise(b, a, 5, diagonal)), best, rtol=1e-4, atol=0)


def test_full_cores_lose_no_more_than_the_leading_directions_of_all_side_by_side():
    b, a = family(10)
    unit = (b @ a) / (b @ a).norm(dim=(1, 2), keepdim=True)
    u = torch.linalg.svd(unit.transpose(0, 1).flatten(1))[0][:, :9]
    v = torch.linalg.svd(unit.flatten(0, 1))[2][:9]
    spectral = (1 - (u.T @ unit @ v.T).square().sum((1, 2))).mean()
    assert lost(b, a, diagonalise(b, a, 9, diagonal=False)) <= spectral


def test_changes_that_share_singular_vectors_are_diagonal():
    random = torch.Generator().manual_seed(1)
    u, v = (torch.linalg.qr(torch.randn(d, 6, generator=random, dtype=torch.float64))[0] for d in (D_OUT, D_IN))
    values = torch.rand(7, 6, generator=random, dtype=torch.float64) + 0.1
    b, a = u * values[:, None], v.T.expand(7, 6, D_IN)
    assert lost(b, a, diagonalise(b, a, 6, diagonal=True)) < 1e-12


def test_a_change_of_zeros_has_a_core_of_zeros_and_disturbs_no_other():
    b, a = family(3)
    with_zero = torch.cat([b, torch.zeros_like(b[:1])]), torch.cat([a, a[:1]])
    joint = diagonalise(*with_zero, 9, diagonal=False)
    assert not joint.cores[3].any()
    errors, norms = relative_errors(*with_zero, joint.u, joint.cores, joint.v)
    assert (errors[:3] / norms[:3]).max() < 1e-12 and errors[3] == norms[3] == 0


def test_norms_are_those_of_the_products_also_of_what_cancels():
    b, a = family(5)
    torch.testing.assert_close(norm_of_product(b, a), (b @ a).norm(dim=(1, 2)))
    opposite = torch.cat([b, -b], dim=2), torch.cat([a, a], dim=1)
    assert (norm_of_product(*opposite) / norm_of_product(b, a)).max() < 1e-14
