"""Trying one family: a verdict for each cache and mode."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from transformers import AttentionInterface, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from hf_kvcache import KVCache, unbind
from tests.model_families.building import build
from tests.model_families.caches import BUDGET, INTERVAL, KINDS, Kind, Make, dynamic
from tests.model_families.catalog import Family
from tests.model_families.generating import Outcome, forward, generate, left_padded, prompt, steps
from tests.model_families.modes import MODES, Mode
from tests.model_families.verdicts import (
    CRASHED,
    DENSE,
    NOT_TRIED,
    REFUSED,
    WORKS,
    WRONG,
    Verdict,
    compare,
    of_error,
)

#: Verdicts by cache and mode; ``construction`` is the only mode where the cache cannot be built.
Results = dict[str, dict[str, Verdict]]
CONSTRUCTION, SMALL_BUDGET, AFTERWARDS = "construction", "small budget", "afterwards"
_IMPLEMENTATION = "hf_kvcache"
#: Families that make their mask within the model, so that a cache does not know which tokens are padding.
_HIDE_PADDING = ("cpmant",)


def _forward_passes(model: PreTrainedModel, new: Callable[[], Any]) -> Outcome:
    cache = new()
    return Outcome(
        None, torch.cat([forward(model, prompt(), cache)[:, -1:], steps(model, prompt(3, seed=9), cache)], 1)
    )


#: A mode that has to run before a small budget is tried.
_STEPS = Mode("steps", _forward_passes)


def try_family(family: Family, kinds: tuple[Kind, ...] = KINDS, modes: tuple[Mode, ...] = MODES) -> Results:
    """All verdicts of a family."""
    model = build(family)
    references = References(model)
    modes = tuple(mode for mode in modes if not mode.images or hasattr(model, "get_image_features"))
    return {kind.name: _try_kind(model, kind, modes, references) for kind in kinds}


class References:
    """The reference outcomes of each mode, computed once with transformers' own cache."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self._known: dict[str, list[Outcome] | Exception] = {}
        #: Modes that fail with transformers' own cache, although their plain form may give a reference.
        self.impossible: set[str] = set()
        #: Modes that transformers' own cache gets wrong without an error: `crop` where there are recurrent states.
        self.wrong: set[str] = set()

    def of(self, mode: Mode) -> list[Outcome]:
        """The outcomes of the mode and of its plain form with ``DynamicCache``; raises if neither runs."""
        if mode.name not in self._known:
            self._known[mode.name] = self._find(mode)
        known = self._known[mode.name]
        if isinstance(known, Exception):
            raise known
        return known

    def _find(self, mode: Mode) -> list[Outcome] | Exception:
        found: list[Outcome] = []
        error: Exception = ValueError(mode.name)
        for run in (mode.run, mode.plain):
            if run is None:
                continue
            try:
                found.append(run(self.model, lambda: _theirs(self.model)))
            except Exception as failure:
                error = failure
                self.impossible |= {mode.name} if run is mode.run else set()
        if mode.name == "crop" and len(found) == 2 and compare(found[0], found[1:]).status == WRONG:
            self.wrong.add(mode.name)
            return found[1:]
        return found or error


def _try_kind(
    model: PreTrainedModel, kind: Kind, modes: tuple[Mode, ...], references: References
) -> dict[str, Verdict]:
    try:
        kind.make(model.config)
    except Exception as error:
        pointless = kind.pointless is not None and kind.pointless in f"{error}"
        return {CONSTRUCTION: Verdict(NOT_TRIED, f"{error}") if pointless else of_error(error)}
    finally:
        unbind(model.config.get_text_config(decoder=True))
    with suppress(Exception):
        references.of(_STEPS)
    chosen = [mode for mode in modes if not kind.modes or mode.name in kind.modes]
    verdicts = {mode.name: _try_mode(model, kind, mode, references) for mode in chosen}
    if (small := kind.small) is not None:
        verdicts[SMALL_BUDGET] = _no_better_than(references, _STEPS, _guarded(lambda: _try_budget(model, kind, small)))
    verdicts[AFTERWARDS] = _guarded(lambda: _afterwards(model, references))
    return verdicts


def _try_mode(model: PreTrainedModel, kind: Kind, mode: Mode, references: References) -> Verdict:
    try:
        right = references.of(mode)
    except Exception as error:
        return Verdict(NOT_TRIED, f"transformers' own cache: {of_error(error).note}"[:200])

    def run() -> Verdict:
        with _attention_calls() as calls:
            ours = mode.run(model, lambda: _ours(model, kind.make))
        verdict = compare(ours, right, kind.bound, mode.loose)
        if verdict.status == WORKS and mode.alike and kind.bound:
            verdict = _as_plain(model, kind, mode, ours, right)
        elif verdict.status == WRONG and mode.plain is not None and kind.bound:
            # An indexer or a router that is swayed by few bits may choose otherwise at many steps, but always alike.
            itself = compare(ours, [mode.plain(model, lambda: _ours(model, kind.make))], rounding=kind.edge)
            verdict = itself if itself.status == WORKS else verdict
        return Verdict(DENSE) if verdict.status == WORKS and not calls else verdict

    return _no_better_than(references, mode, _guarded(run))


def _ours(model: PreTrainedModel, make: Make) -> KVCache:
    """A new cache of this package, after the model has forgotten the sequence before."""
    _forget(model)
    return make(model.config)


def _theirs(model: PreTrainedModel) -> Cache:
    """A new cache of transformers' own, after the model has forgotten the sequence before."""
    _forget(model)
    return dynamic(model)


def _forget(model: Any) -> None:
    """Reset the offset of positions that models with positions in several dimensions keep from the last prompt."""
    for module in model.modules():
        if getattr(module, "rope_deltas", None) is not None:
            module.rope_deltas = None


def _no_better_than(references: References, mode: Mode, verdict: Verdict) -> Verdict:
    """Neither a crash counts where transformers' own cache crashes too, nor a refusal where that one is wrong."""
    theirs = verdict.status == CRASHED and mode.name in references.impossible
    theirs = theirs or (verdict.status == REFUSED and mode.name in references.wrong)
    return Verdict(NOT_TRIED, verdict.note) if theirs else verdict


def _as_plain(model: PreTrainedModel, kind: Kind, mode: Mode, ours: Outcome, right: list[Outcome]) -> Verdict:
    """A row of a batch, a copy and a loaded state of a quantized cache equal the plain form.

    This is not tried where rows depend on each other with transformers' own cache too, or have other keys in a batch.
    """
    if len(right) < 2 or compare(right[0], right[1:]).status != WORKS:
        return Verdict(WORKS)
    if mode.name == "padded batch" and not _rows_alike(model):
        return Verdict(WORKS)
    assert mode.plain is not None
    plain = mode.plain(model, lambda: _ours(model, kind.make))
    verdict = compare(ours, [plain], rounding=kind.edge)
    return verdict if verdict.status == WORKS else Verdict(WRONG, f"{verdict.note} from its plain form")


def _rows_alike(model: PreTrainedModel) -> bool:
    """Whether a row has the same keys beside a longer row as alone; it has not where positions count padding."""
    row = prompt(37, seed=1)
    both: Any = _theirs(model)
    alone: Any = _theirs(model)
    generate(model, left_padded([prompt(), row]), both, 1)
    generate(model, row, alone, 1)
    pairs = [(a.keys[-1], b.keys[0]) for a, b in zip(both.layers, alone.layers, strict=True) if _has_keys(a)]
    ends = [(a[:, -37:], b[:, -37:]) for a, b in pairs]
    alike = all(a.shape == b.shape and float((a - b).abs().max()) < 1e-3 for a, b in ends)
    return alike and model.config.model_type not in _HIDE_PADDING


def _has_keys(layer: Any) -> bool:
    return isinstance(getattr(layer, "keys", None), torch.Tensor) and layer.keys.dim() == 4


def _try_budget(model: PreTrainedModel, kind: Kind, small: Make) -> Verdict:
    """Two runs are alike, and the cache holds no more than its budget and the tokens between two evictions."""
    runs = []
    for _ in range(2):
        cache = _ours(model, small)
        forward(model, prompt(), cache)
        if kind.waits:
            cache.compress(model, prompt())
        runs.append(steps(model, prompt(17, seed=9), cache))
        held = [_held(layer) for layer in cache.layers if getattr(layer, "evictor", None) is not None]
        heads = sum(h * n for h, n in held) / max(1, sum(h for h, _ in held))
        most = BUDGET + (20 if kind.waits else INTERVAL)
        if held and heads > most:
            return Verdict(WRONG, f"holds {heads:.0f} tokens a head, of a budget of {BUDGET}")
        cache.integrity()
    return compare(Outcome(None, runs[0]), [Outcome(None, runs[1])])


def _held(layer: Any) -> tuple[int, float]:
    """The number of heads of a layer, and the average number of tokens that they hold."""
    held = (layer.kept_positions() >= 0).sum(-1).float()
    return held.numel(), float(held.mean())


def _afterwards(model: PreTrainedModel, references: References) -> Verdict:
    """The unbound model gives with transformers' own cache exactly what it gave before."""
    try:
        right = references.of(_STEPS)
    except Exception:
        return Verdict(NOT_TRIED)
    unbind(model.config.get_text_config(decoder=True))
    again = _STEPS.run(model, lambda: _theirs(model))
    return Verdict(WORKS) if torch.equal(again.logits, right[0].logits) else Verdict(WRONG, "the model has changed")


def _guarded(run: Callable[[], Verdict]) -> Verdict:
    try:
        return run()
    except Exception as error:
        return of_error(error)


@contextmanager
def _attention_calls() -> Iterator[list[None]]:
    """Collects an item for each call of this package's attention with keys from a KVCache."""
    function = ALL_ATTENTION_FUNCTIONS[_IMPLEMENTATION]
    calls: list[None] = []

    def counting(module: Any, query: Any, key: Any, *args: Any, **kwargs: Any) -> Any:
        if type(key) is not torch.Tensor:
            calls.append(None)
        return function(module, query, key, *args, **kwargs)

    AttentionInterface.register(_IMPLEMENTATION, counting)
    try:
        yield calls
    finally:
        AttentionInterface.register(_IMPLEMENTATION, function)
