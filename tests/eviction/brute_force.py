"""Every policy's score once more: float64, a head at a time, attention by its definition.

Written from the papers' formulas, with nothing of the package but the policy's options and the context.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from hf_kvcache.eviction import Context, Policy

Score = Callable[..., list[float]]


class Head:
    """The tokens that one KV head of one sequence holds, in float64."""

    def __init__(self, ctx: Context, index: int, kv_head: int) -> None:
        self.ctx, self.index, self.kv_head = ctx, index, kv_head
        held = np.ones(ctx.keys.shape[2], bool) if ctx.held is None else ctx.held[index, kv_head].numpy()
        self.keys = ctx.keys[index, kv_head].double().numpy()[held]
        self.values = ctx.values[index, kv_head].double().numpy()[held]
        self.positions = ctx.positions[index, kv_head].numpy()[held].tolist()
        self.protected = ctx.protected[index, kv_head].numpy()[held].tolist()
        self.accumulated: list[float] = []
        if ctx.accumulated is not None:
            self.accumulated = ctx.accumulated[index, kv_head].double().numpy()[held].tolist()
        self.count = len(self.positions)
        self.bias = np.zeros(self.count)
        if ctx.bias is not None:
            self.bias = ctx.bias[index, kv_head].double().numpy()[held]
        self.at: list[int] = []
        if ctx.queries is not None and ctx.query_positions is not None:
            self.group = ctx.queries.shape[1] // ctx.keys.shape[1]
            first = kv_head * self.group
            self.queries = ctx.queries[index, first : first + self.group].double().numpy()
            at = ctx.query_positions if ctx.query_positions.dim() == 1 else ctx.query_positions[index]
            self.at = at.tolist()

    def attention(self, q: int, query: int) -> np.ndarray:
        """``[count]``, the probabilities of one query of the group's head ``q``."""
        scoring = self.ctx.scoring
        scores = self.keys @ self.queries[q, query] * scoring.scaling
        if scoring.softcap is not None:
            scores = scoring.softcap * np.tanh(scores / scoring.softcap)
        weights = np.where(np.array(self.positions) <= self.at[query], np.exp(scores), 0.0)
        total = weights.sum()
        if scoring.sink_logits is not None:
            total += math.exp(float(scoring.sink_logits[self.kv_head * self.group + q]))
        return weights / total if total else weights

    def observe_window(self, window: int) -> None:
        """Leave the latest queries only: as many as a quarter of the quota, fractions counting as one, and no more
        than ``window``."""
        quarter = sum(1 for token in range(self.ctx.quota) if token % 4 == 0)
        left = max(1, min(window, quarter))
        self.queries, self.at = self.queries[:, max(0, len(self.at) - left) :], self.at[-left:]

    def matrix(self) -> np.ndarray:
        """``[group, queries, count]``."""
        return np.array([[self.attention(q, query) for query in range(len(self.at))] for q in range(self.group)])


def heads_of(ctx: Context) -> Iterator[tuple[int, int]]:
    """The KV heads of each sequence."""
    for index in range(ctx.keys.shape[0]):
        for kv_head in range(ctx.keys.shape[1]):
            yield index, kv_head


def score(policy: Policy, head: Head) -> list[float]:
    """What a policy gives the tokens of a head, those that are held."""
    return SCORES[policy.name](policy, head)


def keep(scores: list[float], protected: list[bool], quota: int) -> set[int]:
    """The protected tokens and, up to the quota, the best of the others; of equals, the newer."""
    kept = {token for token, is_protected in enumerate(protected) if is_protected}
    others = sorted((token for token in range(len(scores)) if token not in kept), key=lambda t: (-scores[t], -t))
    return kept | set(others[: max(0, quota - len(kept))])


def h2o(policy: Any, head: Head) -> list[float]:
    if policy.normalize:
        return [
            accumulated / (head.ctx.seen - position)
            for accumulated, position in zip(head.accumulated, head.positions, strict=True)
        ]
    return head.accumulated


def scissorhands(policy: Any, head: Head) -> list[float]:
    matrix = head.matrix()
    scores = []
    for token, position in enumerate(head.positions):
        unimportant = 0
        for query, at in enumerate(head.at):
            visible = sum(other <= at for other in head.positions)
            for q in range(head.group):
                unimportant += position <= at and matrix[q, query, token] < 1 / visible
        judges = sum(position <= at for at in head.at) or 1
        scores.append(-unimportant / head.group / judges)
    return scores


def tova(policy: Any, head: Head) -> list[float]:
    of_others = [head.kv_head] if policy.per_head else range(head.ctx.keys.shape[1])
    received: dict[int, list[float]] = {}
    for kv_head in of_others:
        other = Head(head.ctx, head.index, kv_head)
        for q in range(other.group):
            for position, weight in zip(other.positions, other.attention(q, len(other.at) - 1), strict=True):
                received.setdefault(position, []).append(weight)
    return [float(np.mean(received[position])) for position in head.positions]


def snapkv(policy: Any, head: Head) -> list[float]:
    head.observe_window(policy.window)
    plain = head.matrix().mean(axis=(0, 1))
    return _pooled(policy.kernel, head, plain, np.mean)


def morphkv(policy: Any, head: Head) -> list[float]:
    head.observe_window(policy.window)
    matrix = head.matrix()
    fused = matrix.sum(axis=1) if policy.fuse == "sum" else matrix.max(axis=1)
    return fused.mean(axis=0).tolist()


def rkv(policy: Any, head: Head) -> list[float]:
    head.observe_window(policy.window)
    importance = _pooled(policy.kernel, head, head.matrix().mean(axis=1).max(axis=0), np.max)
    units = [key / np.linalg.norm(key) for key in head.keys]
    alike = np.array([[a @ b if a is not b else 0.0 for b in units] for a in units])
    for i in range(head.count):
        close = [j for j in range(head.count) if alike[i, j] > policy.threshold]
        if close:
            alike[i, close[-1]] = 0.0
    spread = np.exp(alike.mean(axis=0))
    redundancy = spread / spread.sum()
    return [policy.weight * a - (1 - policy.weight) * r for a, r in zip(importance, redundancy, strict=True)]


def dropkv(policy: Any, head: Head) -> list[float]:
    """Attention over the others once more, without each token in turn."""
    head.observe_window(policy.window)
    scores = np.zeros(head.count)
    matrix = head.matrix()
    for q in range(head.group):
        for query in range(len(head.at)):
            weights = matrix[q, query]
            output = weights @ head.values
            for token in np.flatnonzero(weights):
                others = weights.copy()
                others[token] = 0.0
                left = 1 - weights[token]
                without = others @ head.values / left if left else 0 * output
                scores[token] += np.sum((without - output) ** 2)
    return (scores / (head.group * max(len(head.at), 1))).tolist()


def chunk(policy: Any, head: Head) -> list[float]:
    inner = score(policy.policy, head)
    scores = list(inner)
    members: dict[int, list[int]] = {}
    for token, position in enumerate(head.positions):
        if not head.protected[token]:
            members.setdefault(math.floor(position / policy.length), []).append(token)
    for tokens in members.values():
        for token in tokens:
            scores[token] = math.fsum(inner[each] for each in tokens) / len(tokens)
    return scores


def keydiff(policy: Any, head: Head) -> list[float]:
    units = [key / np.linalg.norm(key) for key in head.keys]
    anchor = sum(units) / len(units)
    return [-float(unit @ anchor) / float(np.linalg.norm(anchor)) for unit in units]


def knorm(policy: Any, head: Head) -> list[float]:
    return [-math.sqrt(sum(channel**2 for channel in key)) for key in head.keys]


def lagkv(policy: Any, head: Head) -> list[float]:
    scores = [1e6] * head.count
    start, lag = policy.sinks, min(policy.lag, max(8, math.floor((head.ctx.quota - policy.sinks) / 4)))
    while start + 2 * lag <= head.count:
        block = range(start, start + lag)
        total = (_against_next(head.keys, block) + _against_next(head.values, block)) / 2
        for token, own in zip(block, total, strict=True):
            scores[token] = own if policy.across else sum(own >= other for other in total) / lag
        start += lag
    return scores


def streaming(policy: Any, head: Head) -> list[float]:
    return [float(position) for position in head.positions]


def keepall(policy: Any, head: Head) -> list[float]:
    return [0.0] * head.count


def ada(policy: Any, head: Head) -> list[float]:
    return score(policy.policy, head)


def critical(policy: Any, head: Head) -> list[float]:
    inner = score(policy.policy, head)
    lift = max(0.0, -min(inner))
    free = max(0, head.ctx.quota - sum(head.protected))
    first = keep(inner, head.protected, sum(head.protected) + math.floor(free * policy.first))
    assert head.ctx.output_weight is not None
    weight = head.ctx.output_weight.double().numpy()
    dim = head.values.shape[1]
    group = weight.shape[1] // dim // head.ctx.keys.shape[1]
    scores = []
    for token in range(head.count):
        lengths = []
        for q in range(head.kv_head * group, (head.kv_head + 1) * group):
            lengths.append(np.abs(weight[:, q * dim : (q + 1) * dim] @ head.values[token]).sum())
        second = (inner[token] + lift + policy.epsilon) * float(np.mean(lengths))
        is_first = token in first and not head.protected[token]
        scores.append(float(np.finfo(np.float32).max) if is_first else second)
    return scores


SCORES: dict[str, Score] = {
    "h2o": h2o,
    "scissorhands": scissorhands,
    "tova": tova,
    "snapkv": snapkv,
    "pyramidkv": snapkv,
    "morphkv": morphkv,
    "rkv": rkv,
    "keydiff": keydiff,
    "knorm": knorm,
    "lagkv": lagkv,
    "streaming": streaming,
    "keepall": keepall,
    "ada": ada,
    "critical": critical,
    "dropkv": dropkv,
    "chunk": chunk,
    "threshold": ada,
    "across": ada,
}


def _pooled(kernel: int, head: Head, plain: np.ndarray, pool: Callable) -> list[float]:
    """Over the neighbours among the tokens before the observed queries; those from there on are not pooled."""
    before = [token for token in range(head.count) if head.positions[token] < head.at[0]]
    scores = plain.tolist()
    for token in before:
        scores[token] = float(pool([plain[other] for other in before if abs(other - token) <= kernel // 2]))
    return scores


def _against_next(states: np.ndarray, block: range) -> np.ndarray:
    """Softmax over a block's tokens of the deviation over channels, in units of the next block's extent."""
    following = states[block.stop : block.stop + len(block)]
    extents = [(min(channel), max(channel)) for channel in following.T.tolist()]
    deviations = []
    for token in block:
        scaled = [
            (value - low) / (high - low) if high > low else 0.0
            for value, (low, high) in zip(states[token].tolist(), extents, strict=True)
        ]
        deviations.append(statistics.stdev(scaled))
    powers = np.exp(deviations)
    return powers / powers.sum()
