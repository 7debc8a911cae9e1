"""From a model and texts to a projection, in one call."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from hf_kvcache.integration.model_identity import model_identity
from hf_kvcache.lowrank.methods import Method, resolve
from hf_kvcache.lowrank.moment_collection import collect
from hf_kvcache.lowrank.moments import Moments
from hf_kvcache.lowrank.projection import Projection
from hf_kvcache.utils.processes import ALONE, Processes


def calibrate(
    model: Any,
    texts: Iterable[str],
    tokenizer: Any,
    method: str | Method = "balanced",
    tokens: int = 100_000,
    length: int = 2048,
    sinks: int = 4,
    names: Sequence[str] = (),
    progress: bool = True,
    processes: Processes = ALONE,
    **options: Any,
) -> Projection:
    """Find the bases in which a model's keys and values can be stored.

    Args:
        model: a causal language model that caches keys and values.
        texts: of the kind that the model will read, from the first one on until there are enough tokens.
        tokenizer: the model's.
        method: a name of :func:`~hf_kvcache.lowrank.methods.available`, or a method that has been made.
        tokens: number of tokens that are read.
        length: number of tokens that are read at a time.
        sinks: first tokens of each chunk that do not count; see :func:`~hf_kvcache.lowrank.moment_collection.collect`.
        names: names of the texts, which are saved with the bases.
        progress: show a progress bar on stderr.
        processes: that each read their share of the texts, with a whole model each; see
            :func:`~hf_kvcache.utils.processes.joined`. All of them get the same bases.
        **options: options of the method: ``group``, ``before_rope``, ``center``.

    Raises:
        ValueError: for a method, an option or a number that is not accepted, texts without tokens, or a model without
            layers that cache keys and values.
    """
    solver = resolve(method, **options)
    heads = model_identity(model.config)["key_value_heads"]
    for number in heads if isinstance(heads, list) else [heads]:
        solver.group_size(number)
    moments = collect(model, texts, tokenizer, tokens, length, sinks, solver.largest_group, progress, processes)
    return solve(moments, solver, names)


def solve(moments: Moments, method: str | Method, names: Sequence[str] = (), **options: Any) -> Projection:
    """The bases of a method from moments that were measured before; the arguments are those of :func:`calibrate`."""
    solver = resolve(method, **options)
    return Projection(
        bases={index: solver.solve(layer) for index, layer in moments.layers.items()},
        method=solver.name,
        options=solver.options(),
        fingerprint=moments.fingerprint,
        weights=moments.weights,
        texts=tuple(names),
        tokens=moments.tokens,
    )
