"""The solutions of the methods, against singular value decompositions of the products in float64."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from hf_kvcache.lowrank.basis import SideBasis
from hf_kvcache.lowrank.methods import available, resolve
from tests.lowrank.structured import SCALING, TOKENS, Layer, make, moments_of

#: Bases are stored in float32. Their products differ by some 1e-6 of the largest direction, squared in an error.
NEAR = {"rtol": 1e-3, "atol": 1e-7}
SHAPES = [{}, {"heads": 1, "ratio": 1}, {"heads": 3, "ratio": 2, "dim": 24, "value_dim": 16}, {"heads": 4, "ratio": 1}]
RANKS = (1, 8, 13)


def reconstructed(x: torch.Tensor, basis: SideBasis, group: int, rank: int) -> torch.Tensor:
    """``x [n, W]``, reconstructed from its first ``rank`` coefficients."""
    mean = 0 if basis.mean is None else basis.mean[group].double()
    return mean + (x - mean) @ basis.down[group, :, :rank].double() @ basis.up[group, :rank].double()


def truncated(product: torch.Tensor, rank: int) -> float:
    """Squared error of the best approximation of that rank."""
    return float(torch.linalg.svdvals(product)[rank:].square().sum())


def errors(layer: Layer, basis: SideBasis, side: str, group: int, rank: int, metric: str) -> list[float]:
    """Squared errors of each group of heads: of its states, of their scores, or of their outputs."""
    found = []
    for index, x in enumerate(layer.side_by_side(side, group)):
        off = (x - reconstructed(x, basis, index, rank)).split(x.shape[1] // group, 1)
        heads = range(index * group, (index + 1) * group)
        found.append(sum(float((o @ maps(layer, head, metric)).square().sum()) for o, head in zip(off, heads)))  # noqa: B905
    return found


def maps(layer: Layer, head: int, metric: str) -> torch.Tensor:
    if metric == "scores":
        return layer.asked(head).T
    if metric == "outputs":
        return layer.projected(head)
    return torch.eye(layer.values.shape[2] if metric == "values" else layer.keys.shape[2], dtype=torch.float64)


@pytest.mark.parametrize("shape", SHAPES)
def test_kq_svd_is_the_truncated_svd_of_the_products(shape: dict[str, int]) -> None:
    """No approximation of ``K Q^T`` and of ``V W_O`` of that rank has a smaller error."""
    layer = make(**shape)
    basis = resolve("kq_svd", center="none").solve(moments_of(layer))
    for rank in RANKS:
        for side, metric in (("keys", "scores"), ("values", "outputs")):
            found = errors(layer, getattr(basis, side), side, 1, rank, metric)
            best = [truncated(getattr(layer, side)[h] @ maps(layer, h, metric), rank) for h in range(layer.heads)]
            torch.testing.assert_close(found, best, **NEAR)


def rounding_cost(layer: Layer, basis: SideBasis, side: str, metric: str) -> float:
    """Squared error of scores or outputs, if each coefficient has an error as large as the mean coefficient."""
    total = 0.0
    for head, x in enumerate(getattr(layer, side)):
        mean = 0 if basis.mean is None else basis.mean[head].double()
        coefficients = (x - mean) @ basis.down[head].double()
        total += float(
            coefficients.square().mean() * (basis.up[head].double() @ maps(layer, head, metric)).square().sum()
        )
    return total


@pytest.mark.parametrize("shape", SHAPES)
def test_balanced_coefficients_cost_least_to_round(shape: dict[str, int]) -> None:
    """They cost the square of the sum of singular values, less than KQ-SVD's own scaling, plain axes or any other."""
    layer = make(**shape)
    moments, generator = moments_of(layer), torch.Generator().manual_seed(3)
    basis = resolve("balanced", group=1, center="none").solve(moments)
    for side, metric in (("keys", "scores"), ("values", "outputs")):
        own = getattr(basis, side)
        least = rounding_cost(layer, own, side, metric)
        products = [x @ maps(layer, head, metric) for head, x in enumerate(getattr(layer, side))]
        states = getattr(layer, side)
        bound = sum(float(torch.linalg.svdvals(p).sum()) ** 2 / p.numel() * p.shape[1] for p in products)
        assert least == pytest.approx(bound / states.shape[2], rel=0.02)  # smallest directions are not scaled fully
        for other in ("kq_svd", "svd"):
            assert rounding_cost(layer, getattr(resolve(other).solve(moments), side), side, metric) > 1.05 * least
        for _ in range(5):
            scale = (0.5 * torch.randn(own.energy.shape, generator=generator)).exp()
            scaled = replace(own, down=own.down * scale[:, None, :], up=own.up / scale[:, :, None])
            assert rounding_cost(layer, scaled, side, metric) > least


def test_balanced_keeps_the_directions() -> None:
    """Cut to a rank, it leaves out what KQ-SVD leaves out, with the same energies."""
    layer = make(heads=4)
    moments = moments_of(layer)
    for chosen in ({"group": 2, "center": "keys"}, {"group": 4, "center": "both"}):
        ours, theirs = (resolve(name, **chosen).solve(moments) for name in ("balanced", "kq_svd"))
        for side in ("keys", "values"):
            a, b = getattr(ours, side), getattr(theirs, side)
            assert torch.equal(a.energy, b.energy)
            for rank in RANKS:
                torch.testing.assert_close(
                    a.down[:, :, :rank] @ a.up[:, :rank], b.down[:, :, :rank] @ b.up[:, :rank], rtol=1e-3, atol=1e-4
                )


@pytest.mark.parametrize("shape", SHAPES)
def test_svd_is_the_truncated_svd_of_the_states(shape: dict[str, int]) -> None:
    layer = make(**shape)
    basis = resolve("svd").solve(moments_of(layer))
    assert basis.keys.mean is None and basis.values.mean is None and not basis.before_rope
    for rank in RANKS:
        for side in ("keys", "values"):
            found = errors(layer, getattr(basis, side), side, 1, rank, side)
            best = [truncated(x, rank) for x in getattr(layer, side)]
            torch.testing.assert_close(found, best, **NEAR)


@pytest.mark.parametrize("group", [1, 2, 4])
def test_palu_is_the_truncated_svd_of_the_heads_of_a_group(group: int) -> None:
    layer = make(heads=4, ratio=1)
    basis = resolve("palu", group=group).solve(moments_of(layer))
    for rank in RANKS:
        for side in ("keys", "values"):
            found = errors(layer, getattr(basis, side), side, group, rank, side)
            torch.testing.assert_close(found, [truncated(x, rank) for x in layer.side_by_side(side, group)], **NEAR)


def test_shared_coefficients_lose_less_than_one_set_per_head() -> None:
    """With as many numbers per token, heads that have something in common lose less when they are stored together."""
    layer = make(heads=4, ratio=2)
    moments = moments_of(layer)
    for name, metrics in (("palu", ("keys", "values")), ("kq_svd", ("scores", "outputs"))):
        alone, together = (resolve(name, group=g, center="none").solve(moments) for g in (1, 4))
        for side, metric in zip(("keys", "values"), metrics, strict=True):
            each = errors(layer, getattr(alone, side), side, 1, 8, metric)
            shared = errors(layer, getattr(together, side), side, 4, 32, metric)
            assert sum(shared) < 0.9 * sum(each)


def test_palu_groups_up_to_four_heads() -> None:
    palu = resolve("palu")
    assert [palu.group_size(heads) for heads in (1, 2, 3, 4, 5, 6, 8, 14)] == [1, 2, 3, 4, 1, 3, 4, 2]
    assert not palu.before_rope and palu.largest_group == 4


#: The errors that the energies of each method are said to be.
METRICS: dict[str, tuple[str, str]] = {
    "svd": ("keys", "values"),
    "palu": ("keys", "values"),
    "kq_svd": ("scores", "outputs"),
    "balanced": ("scores", "outputs"),
}


def test_the_metrics_name_all_methods() -> None:
    assert sorted(METRICS) == available()


@pytest.mark.parametrize("center", ["none", "both"])
@pytest.mark.parametrize("name", METRICS)
def test_energies_are_the_measured_errors(name: str, center: str) -> None:
    """The error at any rank is the sum of the energies after that rank, as a share of the error at rank 0."""
    layer = make(heads=4, ratio=2)
    options: dict[str, Any] = {} if name == "svd" else {"center": center}
    if name in ("palu", "kq_svd", "balanced"):
        options |= {"group": 2}
    basis = resolve(name, **options).solve(moments_of(layer))
    for side, metric in zip(("keys", "values"), METRICS[name], strict=True):
        solved: SideBasis = getattr(basis, side)
        assert (solved.mean is None) == (name == "svd" or center == "none")
        group = layer.heads // solved.down.shape[0]
        whole = torch.tensor(errors(layer, solved, side, group, 0, metric), dtype=torch.float64)
        torch.testing.assert_close(solved.energy.sum(1).double(), whole / whole.sum(), rtol=1e-4, atol=1e-6)
        for rank in (1, 5, 8, 15):
            left = torch.tensor(errors(layer, solved, side, group, rank, metric), dtype=torch.float64) / whole.sum()
            torch.testing.assert_close(left, solved.energy[:, rank:].double().sum(1), rtol=1e-3, atol=2e-6)
        assert (solved.energy.diff(dim=1) <= 1e-7).all()


@pytest.mark.parametrize(
    ("name", "options", "ranks"),
    [
        ("kq_svd", {}, (1, 5, 8, 13)),
        ("kq_svd", {"center": "keys", "group": 2}, (1, 5, 16, 30)),
        ("svd", {}, (8,)),
        ("palu", {}, (16,)),
    ],
)
def test_the_score_of_a_basis(name: str, options: dict[str, Any], ranks: tuple[int, ...]) -> None:
    """Times an energy it is the mean squared error of all scores of all heads, of all queries with all keys."""
    layer = make(heads=2, ratio=3)
    basis = resolve(name, **options).solve(moments_of(layer))
    group = layer.heads // len(basis.keys.down)
    for rank in ranks:
        found = sum(errors(layer, basis.keys, "keys", group, rank, "scores"))
        # The queries here are divided by the root of the number of tokens.
        found *= SCALING**2 / TOKENS / len(layer.queries)
        assert basis.score * float(basis.keys.energy[:, rank:].double().sum()) == pytest.approx(found, rel=1e-3)


@pytest.mark.parametrize("name", available())
def test_at_full_rank_nothing_is_lost(name: str) -> None:
    layer = make(heads=4, ratio=2)
    basis = resolve(name).solve(moments_of(layer))
    for side in ("keys", "values"):
        solved: SideBasis = getattr(basis, side)
        down, up = solved.cut(solved.width)
        eye = torch.eye(solved.width, dtype=torch.float64).expand(len(solved.down), -1, -1)
        torch.testing.assert_close(down.double() @ up.double(), eye, rtol=0, atol=2e-4)


def test_centered_keys_leave_attention_as_it_is() -> None:
    """The error of centered keys is the error of the scores about their mean, which is what softmax sees."""
    layer = make()
    basis = resolve("kq_svd", center="keys").solve(moments_of(layer)).keys
    x, mean = layer.keys[0], layer.keys[0].mean(0)
    assert basis.mean is not None
    torch.testing.assert_close(basis.mean[0].double(), mean, rtol=1e-6, atol=1e-6)
    best = truncated((x - mean) @ layer.asked(0).T, 8)
    assert errors(layer, basis, "keys", 1, 8, "scores")[0] == pytest.approx(best, rel=1e-3)
    # Without the mean, the scores of a query all differ by the same number.
    scores = ((x - mean) @ basis.down[0].double() @ basis.up[0].double()) @ layer.asked(0).T
    exact = x @ layer.asked(0).T
    torch.testing.assert_close(scores.softmax(0), exact.softmax(0), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("dead", ["queries", "keys", "values", "output"])
def test_degenerate_states(dead: str) -> None:
    """Directions that no query reads, and states that are all zero, lead to finite bases that lose nothing else."""
    layer = make(heads=2, ratio=1)
    part = getattr(layer, dead)
    if dead == "output":
        part[:, :16] = 0
    else:
        part[0] = 0
        part[1, :, 5:] = 0
    for name in available():
        basis = resolve(name).solve(moments_of(layer))
        for side in ("keys", "values"):
            solved: SideBasis = getattr(basis, side)
            assert all(t.isfinite().all() for t in (solved.down, solved.up, solved.energy))
            eye = torch.eye(solved.width, dtype=torch.float64)
            assert ((solved.down.double() @ solved.up.double()) - eye).abs().max() < 1e-2


def test_queries_of_low_rank_need_few_coefficients() -> None:
    """Where queries have only 5 directions, 5 coefficients give all scores, but not with a plain SVD of the keys."""
    layer = make(heads=1, ratio=1)
    layer.queries[0, :, 5:] = 0
    moments = moments_of(layer)
    lost = {
        name: errors(layer, resolve(name).solve(moments).keys, "keys", 1, 5, "scores")[0] for name in ("svd", "kq_svd")
    }
    assert lost["kq_svd"] < 1e-4 * lost["svd"]


def test_coefficients_of_kq_svd_weigh_the_same() -> None:
    """The same noise in any coefficient costs the scores the same, up to the floor of the eigenvalues."""
    layer = make(heads=1, ratio=2)
    basis = resolve("kq_svd").solve(moments_of(layer)).keys
    costs = (basis.up[0].double() @ layer.asked(0).T).square().sum(1)
    torch.testing.assert_close(costs, costs.mean().expand_as(costs), rtol=1e-2, atol=0)
