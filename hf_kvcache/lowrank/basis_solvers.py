"""Solving for a basis whose first directions leave the least error."""

from __future__ import annotations

from dataclasses import replace

import torch

from hf_kvcache.lowrank.basis import SideBasis

#: Eigenvalues of a metric below this share of the largest are raised to it. Inverting smaller ones would amplify noise,
#: and the states that a cache stores never have quite the moments that were measured.
EIGENVALUE_FLOOR = 1e-6


def least_error_basis(
    second: torch.Tensor, mean: torch.Tensor | None = None, metric: torch.Tensor | None = None
) -> SideBasis:
    """The basis whose first ``r`` directions, for any ``r``, leave the least ``E[(x - x_hat) M (x - x_hat)^T]``.

    With ``M = C C^T`` these are the principal axes of ``z = x C``, since ``|z - z_hat|^2`` is the error. The
    coefficients are the coordinates of ``z``: a rounding error costs the same in each of them.

    Args:
        second: float64 ``[G, W, W]``, second moments of ``x`` about its mean.
        mean: float64 ``[G, W]``, what was subtracted from ``x``.
        metric: float64 ``[G, W, W]``, ``M``; the identity if None.
    """
    if metric is None:
        values, axes = torch.linalg.eigh(second)
        down, up = axes.flip(-1), axes.flip(-1).mT
    else:
        # Scaled to a mean eigenvalue of 1, coefficients stay as large as states. Errors count in the metric as given.
        scale = metric.diagonal(dim1=-2, dim2=-1).mean(-1).clamp_min(torch.finfo(metric.dtype).tiny)
        root, inverse = _root(metric / scale[:, None, None])
        values, axes = torch.linalg.eigh(root.mT @ second @ root)
        values = values * scale[:, None]
        down, up = root @ axes.flip(-1), axes.flip(-1).mT @ inverse
    return SideBasis(down.float(), up.float(), energy_shares(values.flip(-1)), None if mean is None else mean.float())


def balance_rounding(basis: SideBasis) -> SideBasis:
    """The same directions, with the coefficients scaled so that rounding them costs least.

    A codec that rotates spreads its error evenly over the coefficients, in proportion to their mean square. With
    squares ``v_i f_i^2`` and costs ``c_i / f_i^2`` of a squared error, the sum of all costs is
    ``(sum v_i f_i^2) (sum c_i / f_i^2)``. It is least, ``(sum sqrt(v_i c_i))^2``, for ``f_i^4 = c_i / v_i``
    (Cauchy-Schwarz).

    Args:
        basis: one in which an error costs the same in each coefficient, as :func:`least_error_basis` returns it. The
            energy of a direction is then its ``v_i c_i``, in proportion to its ``v_i``.
    """
    energy = basis.energy.clamp_min(EIGENVALUE_FLOOR * float(basis.energy.max().clamp_min(EIGENVALUE_FLOOR)))
    scale = energy**-0.25
    scale = scale / scale.mean(-1, keepdim=True)
    return replace(basis, down=basis.down * scale[:, None, :], up=basis.up / scale[:, :, None])


def energy_shares(errors: torch.Tensor) -> torch.Tensor:
    """Errors ``[G, W]`` as shares of the layer's sum, float32; zeros where all errors are zero."""
    errors = errors.clamp_min(0)
    return (errors / errors.sum().clamp_min(torch.finfo(errors.dtype).tiny)).float()


def block_diagonal(blocks: torch.Tensor, group: int) -> torch.Tensor:
    """Matrices of neighbouring heads ``[Hkv, D, D]`` on the diagonal of larger ones ``[Hkv / g, g * D, g * D]``."""
    return torch.stack([torch.block_diag(*heads) for heads in blocks.unflatten(0, (-1, group))])


def _root(metric: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """``C`` with ``C C^T`` the metric, and the inverse of ``C``."""
    values, axes = torch.linalg.eigh(metric)
    values = values.clamp_min(EIGENVALUE_FLOOR * values.amax(-1, keepdim=True).clamp_min(1.0)).sqrt()
    return axes * values[:, None, :], axes.mT / values[:, :, None]
