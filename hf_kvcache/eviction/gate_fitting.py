"""Fitting the map of a learned gate: ridge regression in closed form, or a small MLP by gradient descent."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from hf_kvcache.eviction.gates import LayerGate

#: Scores below this one count as this one: a logarithm has no value at zero.
SMALLEST_SCORE = 1e-12
#: Strengths of the ridge that are tried, relative to the mean square of a centered, scaled hidden state.
RIDGES = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
#: Scores by which a layer's need for tokens is told apart from that of others.
LEVELS = 512
_EPOCHS, _BATCH, _RATE, _DECAY = 15, 128, 3e-3, 1e-2


@dataclass
class Moments:
    """Sums over tokens of one layer, in float64, from which a ridge regression follows.

    Attributes:
        count: tokens.
        first: sums of hidden states with the targets behind them, ``[hidden + Hkv]``; None before the first token.
        second: sums of their products, ``[hidden + Hkv, hidden + Hkv]``.
    """

    count: int = 0
    first: torch.Tensor | None = None
    second: torch.Tensor | None = None

    def add(self, hidden: torch.Tensor, targets: torch.Tensor) -> None:
        """Add tokens: ``hidden [n, hidden]`` and ``targets [n, Hkv]``."""
        both = torch.cat([hidden.double(), targets.to(hidden.device).double()], 1)
        self.count += len(both)
        first, second = both.sum(0), both.mT @ both
        self.first = first if self.first is None else self.first + first
        self.second = second if self.second is None else self.second + second

    def centered(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean ``[n]`` and covariance ``[n, n]`` of hidden states and targets."""
        assert self.first is not None and self.second is not None
        mean = self.first / self.count
        return mean, self.second / self.count - mean[:, None] * mean


@dataclass
class LayerData:
    """What is known of one layer's tokens.

    Attributes:
        width: width of a hidden state.
        fitted: moments of the tokens that a map is fitted to.
        held_out: moments of those that it is tested on.
        targets: targets ``[n, Hkv]`` of all of them, in parts.
        hidden: hidden states ``[n, hidden]`` of the fitted tokens and their targets, in parts; empty if not asked for.
        tested: the same of the held-out tokens.
    """

    width: int
    fitted: Moments = field(default_factory=Moments)
    held_out: Moments = field(default_factory=Moments)
    targets: list[torch.Tensor] = field(default_factory=list)
    hidden: list[tuple[torch.Tensor, torch.Tensor]] = field(default_factory=list)
    tested: list[tuple[torch.Tensor, torch.Tensor]] = field(default_factory=list)

    def add(self, hidden: torch.Tensor, targets: torch.Tensor, held_out: bool, keep: bool) -> None:
        """Add tokens: ``hidden [n, hidden]`` and ``targets [n, Hkv]``; ``keep`` them, not only their moments."""
        (self.held_out if held_out else self.fitted).add(hidden, targets)
        self.targets.append(targets.float().cpu())
        if keep:
            (self.tested if held_out else self.hidden).append((hidden.bfloat16(), targets.float()))

    def levels(self) -> torch.Tensor:
        """Equally likely targets, ascending."""
        every = torch.cat(self.targets).flatten().sort().values
        places = (torch.arange(LEVELS, dtype=torch.float64, device="cpu") + 0.5) / LEVELS * len(every)
        return every[places.long().clamp_max(len(every) - 1)].float()


def fit_linear(data: LayerData, ridges: tuple[float, ...] = RIDGES) -> tuple[LayerGate, float]:
    """The linear map with the ridge that explains most of the held-out tokens, and the share that it explains."""
    width = data.width
    mean, covariance = data.fitted.centered()
    scale = covariance.diagonal()[:width].clamp_min(1e-24).sqrt()
    # With eigenvectors of the scaled covariance, each ridge costs no more than a product.
    values, vectors = torch.linalg.eigh(covariance[:width, :width] / (scale[:, None] * scale))
    along = vectors.mT @ (covariance[:width, width:] / scale[:, None])
    best: tuple[LayerGate, float] | None = None
    for ridge in ridges:
        weight = ((vectors @ (along / (values.clamp_min(0) + ridge)[:, None])) / scale[:, None]).mT
        explained = _explained(weight, mean[width:] - weight @ mean[:width], data.held_out, width)
        if best is None or explained > best[1]:
            bias = mean[width:] - weight @ mean[:width]
            best = LayerGate([weight.float().cpu(), bias.float().cpu()], data.levels()), explained
    assert best is not None
    return best


def _explained(weight: torch.Tensor, bias: torch.Tensor, tested: Moments, width: int) -> float:
    """The share of the targets' variance that a linear map explains, a mean over heads (the coefficient R^2)."""
    mean, covariance = tested.centered()
    error = torch.cat([-weight, torch.eye(len(weight), dtype=weight.dtype, device=weight.device)], 1)
    missed = mean[width:] - weight @ mean[:width] - bias
    left = (error @ covariance * error).sum(1) + missed.square()
    return float((1 - left / covariance.diagonal()[width:].clamp_min(1e-24)).mean())


def fit_mlp(data: LayerData, inner: int, seed: int = 0) -> LayerGate:
    """An MLP with ``inner`` channels, begun at random and fitted by Adam; on the device of the hidden states."""
    hidden = torch.cat([part for part, _ in data.hidden])
    device, width = hidden.device, data.width
    mean, covariance = (x.float().to(device) for x in data.fitted.centered())
    spread = covariance.diagonal().clamp_min(1e-12).sqrt()
    targets = torch.cat([part for _, part in data.hidden]).to(device)
    targets = (targets - mean[width:]) / spread[width:]
    draw = torch.Generator().manual_seed(seed)
    weights: list[torch.Tensor] = []
    for shape in ((inner, width), (targets.shape[1], inner)):
        random = torch.randn(shape, generator=draw, dtype=torch.float32, device="cpu").to(device)
        weights += [random * shape[1] ** -0.5, torch.zeros(shape[0], dtype=torch.float32, device=device)]
    with torch.enable_grad():
        for weight in weights:
            weight.requires_grad_()
        steps = _EPOCHS * -(-len(hidden) // _BATCH)
        adam = torch.optim.AdamW(weights, lr=_RATE, weight_decay=_DECAY)
        falling = torch.optim.lr_scheduler.CosineAnnealingLR(adam, steps)
        for _ in range(_EPOCHS):
            for chosen in torch.randperm(len(hidden), generator=draw, device="cpu").split(_BATCH):
                chosen = chosen.to(device)
                x = (hidden[chosen].float() - mean[:width]) / spread[:width]
                error = LayerGate(weights)(x[None])[0].mT - targets[chosen]
                adam.zero_grad()
                error.square().mean().backward()
                adam.step()
                falling.step()
    w1, b1, w2, b2 = (weight.detach() for weight in weights)
    # The map takes hidden states as they are and gives targets as they are.
    w1, b1 = w1 / spread[:width], b1 - (w1 / spread[:width]) @ mean[:width]
    w2, b2 = w2 * spread[width:, None], b2 * spread[width:] + mean[width:]
    return LayerGate([x.float().cpu() for x in (w1, b1, w2, b2)], data.levels())


def fit_of(gate: LayerGate, data: LayerData) -> float:
    """The share of the targets' variance that a map explains in the held-out tokens, a mean over heads."""
    hidden, targets = (torch.cat(parts) for parts in zip(*data.tested, strict=True))
    found = gate.to(hidden.device)(hidden[None])[0].mT
    left = (found - targets).square().mean(0) / targets.var(0, correction=0).clamp_min(1e-24)
    return float((1 - left).mean())
