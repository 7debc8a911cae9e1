"""What there is to know of each method, from its class and its file: nothing is said here that is not said there.

The first sentence of a method's file says what it is and names the paper. What a method needs and what it costs in a
decode step follow from the attributes by which the caches treat it.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch

from hf_kvcache import codecs, eviction
from hf_kvcache.cli.method_results import Result, results
from hf_kvcache.codecs.pages import PageEncoder
from hf_kvcache.eviction import Policy
from hf_kvcache.eviction.base import ALL_QUERIES
from hf_kvcache.lowrank import methods as low_rank
from hf_kvcache.sparse import registry as selectors

#: Shape for which bits are counted: width of a head, tokens of a page.
_WIDTH, _PAGE = 128, 128
_PAPER = re.compile(r"arXiv:(\d{4}\.\d{5})")
#: Share of the tokens kept, of the width, and of the tokens read, whose figure is shown.
_KEPT, _RANK, _READ = "0.25", "0.5", "0.25"
#: Bits whose figure is shown of codecs that have them.
_BITS = 4
_NONE = "nothing"


@dataclass(frozen=True)
class Method:
    """A codec, a policy, a low-rank method or a selector.

    Attributes:
        kind: which of these.
        name: the registered name.
        summary: what it is, a sentence.
        paper: its number on arXiv; empty for none.
        setting: the bits or the budget that it takes.
        needs: what it looks at beyond the tokens, or waits for.
        step: what it costs in a decode step beside reading the cache.
        measured: its figures in the tracked results.
        shown: the one of them that tables show.
    """

    kind: str
    name: str
    summary: str
    paper: str
    setting: str
    needs: str
    step: str
    measured: list[Result] = field(default_factory=list)
    shown: Result | None = None


def all_methods() -> list[Method]:
    """All registered methods: codecs, policies, what goes in front of a policy, low-rank methods, selectors."""
    return [*_codecs(), *_policies(), *_wrappers(), *_low_rank(), *_selectors()]


def _codecs() -> Iterator[Method]:
    for name in codecs.available():
        codec = codecs.resolve(name)
        setting = ", ".join(f"{bits} ({_stored_bits(name, bits)})" for bits in codec.supported_bits)
        encoder = _encoder(name, None)
        step = [
            "rotates the query and the output" * any(x.rotation != "none" for x in encoder.layout.sides.values()),
            "a page is packed by several launches" * (codec.keys.method is None or codec.values.method is None),
        ]
        measured = results("standard", rf"{name}\d*") + results("latent", rf"(latent\S*\+)?{name}\d.*")
        # The longest context of the standard suite stands last, behind it the other suite.
        ranked = sorted(measured, key=lambda x: (x.cache == f"{name}{_BITS}", x.file == "standard.csv"))
        shown = [x for x in ranked if re.fullmatch(rf"{name}\d*", x.cache)]
        yield Method(
            "codec",
            name,
            *_said(type(codec)),
            setting or _stored_bits(name, None),
            "the mean of the first packed keys" if encoder.centered else _NONE,
            _listed(*step),
            measured,
            shown[-1] if shown else None,
        )


def _policies() -> Iterator[Method]:
    for name in eviction.available():
        measured = results("eviction", rf"{name}@[\d.]+")
        yield _policy("policy", name, eviction.resolve(name), measured)


def _wrappers() -> Iterator[Method]:
    for name in eviction.wrappers():
        measured = results("eviction", rf"{name}-\w+@[\d.]+")
        # In front of a policy that needs nothing, so that what it needs is its own.
        yield _policy("in front of a policy", name, eviction.resolve(f"{name}-streaming"), measured)


def _policy(kind: str, name: str, policy: Policy, measured: list[Result]) -> Method:
    known = {0: "", 1: "the last query", ALL_QUERIES: "all queries of a prompt"}
    queries = known.get(policy.observed, f"the last {policy.observed} queries")
    needs = _listed(
        queries,
        "the attention of every query" * policy.needs_accumulated,
        "a second reading of the context, compress(model, input_ids)" * policy.needs_replay,
        "compress(), which chooses in all layers at once" * (policy.across_layers and not policy.needs_replay),
        "keys and values" * (policy.needs_states and policy.needs_values),
        "keys" * (policy.needs_states and not policy.needs_values),
        "the rotary embedding" * policy.needs_rope,
        "the output projection" * policy.needs_output,
        "hidden states, and a file of hf-kvcache calibrate" * policy.needs_hidden,
        "optionally a calibration" * ("calibration" in inspect.signature(type(policy)).parameters),
    )
    step = _listed(
        "sums of attention, on a CPU without a prepared call" * policy.needs_accumulated,
        "the query is kept" * bool(policy.observed),
        "the sinks are rotated at each eviction" * policy.moves_sinks,
    )
    shown = [x for x in measured if x.cache.endswith(f"@{_KEPT}")]
    budget = "tokens or a share" if policy.head_floor is None else "tokens or a share, split among the heads of a layer"
    if policy.across_layers:
        budget = "tokens or a share, split among all heads"
    if policy.keeps_above is not None:
        budget = "a score, and tokens or a share at most"
    return Method(kind, name, *_said(type(policy)), budget, needs, step, measured, shown[0] if shown else None)


def _low_rank() -> Iterator[Method]:
    for name in low_rank.available():
        method = low_rank.resolve(name)
        step = "keys are rotated again" if method.before_rope else "the query is taken into the basis"
        measured = results("latent", rf"latent\S*projection={name}(;\S*)?")
        # Measured as the paper has it, with keys before their rotary embedding; the name in the table says so.
        measured = measured or results("latent", rf"latent\S*projection={name}_before(;\S*)?")
        shown = [x for x in measured if x.cache.startswith(f"latent@{_RANK}:")] or measured
        groups = "each head" if method.group == 1 else f"up to {method.largest_group} heads together"
        yield Method(
            "low-rank method",
            name,
            *_said(type(method)),
            f"rank or share of the width, {groups}",
            "a calibration",
            step,
            measured,
            shown[0] if shown else None,
        )


def _selectors() -> Iterator[Method]:
    for name in selectors.available():
        selector = selectors.resolve(name)
        vectors = selector.vectors
        needs = _listed(
            f"{vectors} {'vector' if vectors == 1 else 'vectors'} for each part of a page" * bool(vectors),
            "the attention of a step to all pages" * selector.exact,
            "layers that choose for others, optionally found by a calibration" * selector.shared,
        )
        readers = "some layers read" if selector.shared else "every layer reads"
        step = "scores of the pages" + f", for which {readers} all of them" * selector.exact
        measured = results("sparse", rf"\S*selector={name}(;\S*)?")
        shown = [x for x in measured if f"@{_READ}" in x.cache] or measured
        yield Method(
            "selector",
            name,
            *_said(type(selector)),
            "tokens read, or a share",
            needs,
            step,
            measured,
            shown[0] if shown else None,
        )


def _said(cls: type) -> tuple[str, str]:
    """What a method is, and the paper, from the first sentence of its file."""
    text = " ".join((inspect.getdoc(sys.modules[cls.__module__]) or "").split("\n\n")[0].split())
    paper = _PAPER.search(text)
    if paper is None:
        return text.rstrip("."), ""
    # "(arXiv:...)" goes, and "(KIVI, arXiv:...)" becomes "(KIVI)".
    summary = text.replace(f" ({paper[0]})", "").replace(f", {paper[0]})", ")")
    return summary.rstrip("."), paper[1]


def _encoder(name: str, bits: int | None) -> PageEncoder:
    return PageEncoder(codecs.resolve(name, bits), _WIDTH, _WIDTH, _PAGE, torch.bfloat16)


def _stored_bits(name: str, bits: int | None) -> str:
    return f"{_encoder(name, bits).layout.bits_per_element:.4g}"


def _listed(*parts: str) -> str:
    return "; ".join(part for part in parts if part) or _NONE
