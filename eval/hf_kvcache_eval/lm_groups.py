"""lm-eval's requests, brought together so that a context that several of them share is prefilled once."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

logger = logging.getLogger(__name__)

#: Continuations of one context that are decoded together, whatever the batch size: forks share the context's pages.
MOST_FORKS = 16

#: What lm-eval makes of a request: a key for its store of answers or None, tokens of context and continuation.
Request = tuple[Any, list[int], list[int]]


@dataclass
class Group:
    """Continuations of one context.

    Attributes:
        context: at least one token; the last one is decoded, the others are prefilled.
        members: index of the request and continuation, longest first.
    """

    context: tuple[int, ...]
    members: list[tuple[int, list[int]]]


def make_groups(requests: Sequence[Request], max_length: int) -> list[Group]:
    """The requests by context, longest first so that a batch needs little padding and runs out of memory early.

    Args:
        requests: as lm-eval gives them.
        max_length: tokens that the model can take; longer contexts lose their first tokens, as in lm-eval.

    Raises:
        ValueError: for an empty context, or a continuation that is empty or longer than ``max_length``.
    """
    by_context: dict[tuple[int, ...], list[tuple[int, list[int]]]] = {}
    truncated = 0
    for index, (_, context, continuation) in enumerate(requests):
        if not context:
            raise ValueError(f"request {index} has no context; accepted: at least one token")
        if not 0 < len(continuation) <= max_length:
            raise ValueError(
                f"the continuation of request {index} has {len(continuation)} tokens; accepted: 1 to {max_length}"
            )
        room = max_length + 1 - len(continuation)  # the last token is predicted and never fed
        truncated += len(context) > room
        by_context.setdefault(tuple(context[-room:]), []).append((index, continuation))
    if truncated:
        logger.warning("%d contexts were cut from the left to the model's %d tokens", truncated, max_length)
    groups = [group for context, members in by_context.items() for group in _split(context, members)]
    return sorted(groups, key=lambda group: (-len(group.context), -len(group.members[0][1]), group.context))


def batches(groups: Sequence[Group], rows: int) -> Iterator[list[Group]]:
    """Neighbors of up to ``rows`` continuations in all, but at least one group; empty prefills apart from others."""
    batch: list[Group] = []
    for group in groups:
        held = sum(len(other.members) for other in batch)
        apart = bool(batch) and (len(batch[0].context) == 1) != (len(group.context) == 1)
        if batch and (apart or held + len(group.members) > rows):
            yield batch
            batch = []
        batch.append(group)
    if batch:
        yield batch


def right_padded(batch: Sequence[Group]) -> tuple[torch.Tensor, torch.Tensor]:
    """What is decoded after the forks of ``batch``, and what each of these tokens is to predict, both ``[B, n]``."""
    rows = [(group.context[-1], continuation) for group in batch for _, continuation in group.members]
    width = max(len(continuation) for _, continuation in rows)
    tokens = torch.zeros(len(rows), width, dtype=torch.long)
    targets = torch.zeros_like(tokens)
    for row, (last, continuation) in enumerate(rows):
        tokens[row, : len(continuation)] = torch.tensor([last, *continuation[:-1]])
        targets[row, : len(continuation)] = torch.tensor(continuation)
    return tokens, targets


def _split(context: tuple[int, ...], members: list[tuple[int, list[int]]]) -> Iterator[Group]:
    # A context of one token is not prefilled: nothing is shared, and a rolling window is a long row of its own.
    most = 1 if len(context) == 1 else MOST_FORKS
    members = sorted(members, key=lambda member: -len(member[1]))
    for start in range(0, len(members), most):
        yield Group(context, members[start : start + most])
