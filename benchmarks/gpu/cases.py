"""Cases of every operation that has a Triton kernel, each against float64 over what the pages really hold.

``tests/gpu`` runs the same cases.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch

from benchmarks.gpu.measuring import largest, relative
from benchmarks.gpu.results import Figures
from benchmarks.gpu.settings import Settings, backend
from hf_kvcache.codecs import resolve, specs
from hf_kvcache.codecs.latent import LatentCodec
from hf_kvcache.codecs.pages import PageEncoder
from hf_kvcache.kernels.attention import MOST_DECODED_QUERIES, attend
from hf_kvcache.kernels.column_sums import column_sums
from hf_kvcache.kernels.dispatch import implementation
from hf_kvcache.kernels.hadamard import rotate, rotation_matrix
from hf_kvcache.kernels.inputs import Attention, DenseTokens, Pages, Scoring
from hf_kvcache.kernels.latent_decode import latent_attend
from hf_kvcache.kernels.pack import decode_side
from hf_kvcache.kernels.page import SideFormat
from hf_kvcache.kernels.reference.levels import decode_side as decode_in_torch
from hf_kvcache.kernels.visibility import Visibility
from hf_kvcache.storage import PagedStorage

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
#: What an error relative to the result may be. Models in 16 bits take packed pages in half precision.
ALLOWED = {"fp32": 2e-4, "fp16": 4e-3, "bf16": 8e-3}
#: What a log-sum-exp may be off: gross errors only, since it is rounded with the scores.
ALLOWED_LOG_SUM_EXP = 0.1
#: How much larger than the reference's the error of packing may be: codes on an edge may come out the other way.
WORSE_ROUNDING = 1.02
CPU = torch.device("cpu")
DEFAULTS = ("unbiased4", "rotated8", "none", "unbiased2", "unbiased3", "fp8")


class Case(NamedTuple):
    """What is to be run, and the dtype that decides what is allowed."""

    name: str
    dtype: str
    run: Callable[[], Figures]

    def problems(self, found: Figures) -> list[str]:
        """What is wrong with the figures that :attr:`run` returned."""
        wrong = []
        if not found["finite"]:
            wrong.append("a result is not finite")
        if not found["relative_error"] <= ALLOWED[self.dtype]:
            wrong.append(f"relative error {found['relative_error']:.2e}, {ALLOWED[self.dtype]:.0e} is allowed")
        if not found.get("log_sum_exp_error", 0.0) <= ALLOWED_LOG_SUM_EXP:
            wrong.append(f"log-sum-exp off by {found['log_sum_exp_error']:.2e}")
        if not found.get("sums_error", 0.0) <= 2 * ALLOWED[self.dtype]:
            wrong.append(f"sums of probabilities off by {found['sums_error']:.2e}")
        for side in ("keys", "values"):
            here, there = (found.get(f"{side}_rounding_{where}", 0.0) for where in ("here", "there"))
            if not there <= WORSE_ROUNDING * here + 1e-6:
                wrong.append(f"{side} are packed with an error of {there:.2e}, {here:.2e} by the reference")
        if not found.get("same_again", True):
            wrong.append("a second call gave other bits")
        return wrong


@dataclass(frozen=True)
class Sizes:
    """An attention call over pages and full-precision tokens, of which the last are the queries' own.

    Attributes:
        ragged: a padded batch, with fewer tokens in the buffer and pages that lost some.
        positions: whether the kernel gets positions though it could do without.
        sums: whether the probabilities of the tokens are asked for.
    """

    codec: str | None = "unbiased4"
    dtype: str = "bf16"
    batch: int = 1
    heads: int = 8
    group: int = 4
    dim: int = 128
    value_dim: int = 0
    page: int = 128
    columns: int = 9
    slots: int = 168
    queries: int = 1
    window: int | None = None
    softcap: float | None = None
    sinks: bool = False
    ragged: bool = False
    positions: bool = False
    sums: bool = False

    def __str__(self) -> str:
        usual = vars(Sizes(self.codec, self.dtype))
        return " ".join([str(self.codec), self.dtype, *(f"{k}={v}" for k, v in vars(self).items() if v != usual[k])])

    def made_tiny(self) -> Sizes:
        """The same with sizes for a dry run."""
        return replace(
            self,
            dim=min(self.dim, 32),
            value_dim=min(self.value_dim, 32),
            page=16,
            columns=min(self.columns, 2),
            slots=min(self.slots, 24),
            queries=min(self.queries, 18),
            heads=min(self.heads, 2),
        )


def storage_of(s: Sizes, device: torch.device, draw: torch.Generator) -> PagedStorage:
    """A storage that holds exactly that many pages and full-precision tokens."""
    dtype, value_dim = DTYPES[s.dtype], s.value_dim or s.dim
    tokens, sinks = s.slots + s.columns * s.page, min(4, s.slots - 1)
    keys, values = (torch.randn(s.batch, s.heads, tokens, d, generator=draw) for d in (s.dim, value_dim))
    # Keys as models have them: a mean per channel, and some channels much larger than others.
    keys = keys * (1 + 3 * torch.rand(s.dim, generator=draw) ** 4) + torch.randn(s.dim, generator=draw)
    encoder = PageEncoder(resolve(s.codec or "none"), s.dim, value_dim, s.page, dtype)
    return filled(encoder, keys.to(device, dtype), values.to(device, dtype), sinks, s.slots, s.columns)


def filled(
    encoder: PageEncoder, keys: torch.Tensor, values: torch.Tensor, sinks: int, slots: int, columns: int
) -> PagedStorage:
    """A storage with these tokens, ``slots`` of them in full precision and the others in ``columns`` pages."""
    storage = PagedStorage(encoder, keys, values, sinks, slots - sinks)
    storage.append_block(keys, values, 0, None)
    pages = storage.pages()
    assert (0 if pages is None else pages.columns) == columns and storage.dense.longest == slots
    return storage


def held_in_pages(storage: PagedStorage, side: str) -> torch.Tensor:
    """What the pages hold, float64 ``[rows, columns * P, D]`` on the CPU, by plain torch."""
    pages = storage.pages()
    assert pages is not None
    layout, fmt = storage.layout, storage.layout.sides[side]
    records = pages.records(0, pages.columns).cpu().contiguous()
    out = torch.full((*records.shape[:2], layout.page_size, fmt.dim), torch.nan, device=CPU)
    tokens = decode_in_torch(layout, side, records, out).double()
    if side == "keys" and pages.key_mean is not None:
        tokens = tokens + pages.key_mean.double().cpu()[None, :, None]
    matrix = rotation_matrix(fmt.dim, fmt.rotation, torch.float64, CPU)
    tokens = tokens if matrix is None else tokens @ matrix.T
    return tokens.transpose(0, 1).flatten(1, 2)


@dataclass
class Problem:
    """An attention call on the device, and what it is about on the CPU.

    Attributes:
        packed: keys and values ``[B * Hkv, n, D]`` that the pages hold, and positions ``[B * Hkv, n]``, -1 where there
            is no token; None without pages.
        places: positions ``[B, m]`` of the full-precision tokens, -1 where there is none.
    """

    query: torch.Tensor
    pages: Pages | None
    tokens: DenseTokens
    visibility: Visibility
    scoring: Scoring
    packed: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None
    places: torch.Tensor

    @property
    def call(self) -> tuple[torch.Tensor, Pages | None, DenseTokens, Visibility, Scoring]:
        return self.query, self.pages, self.tokens, self.visibility, self.scoring


def problem_of(s: Sizes, device: torch.device, seed: int) -> Problem:
    """A call of these sizes with random contents."""
    draw = torch.Generator().manual_seed(seed)
    storage = storage_of(s, device, draw)
    pages, dense = None if s.codec is None else storage.pages(), storage.dense
    packed = None
    at = torch.from_numpy(dense.positions[:, : s.slots].copy())
    start, unused, places = int(at.max()) + 1 - s.queries, None, at
    if pages is not None:
        positions = pages.positions(0, pages.columns).flatten(1).cpu()
        if s.ragged:
            counts = pages.counts.copy()
            counts[-1, -1], counts[0, 0] = s.page // 2, 3
            pages = replace(pages, counts=counts, prepared={})
            there = torch.from_numpy(np.arange(s.page) < counts[:, :, None]).flatten(1)
            positions = positions.masked_fill(~there, -1)
        packed = held_in_pages(storage, "keys"), held_in_pages(storage, "values"), positions
    if s.ragged:
        gone = torch.zeros(at.shape, dtype=torch.bool)
        gone[-1, 4 : 4 + s.slots // 3] = True
        unused, places = gone.to(device), at.masked_fill(gone, -1)
    placed = s.positions or s.ragged or s.window is not None or s.queries > 1
    keys, values = dense.keys[:, :, : s.slots], dense.values[:, :, : s.slots]
    tokens = DenseTokens(keys, values, at.to(device) if placed else None, unused)
    query = torch.randn(s.batch, s.queries, s.heads * s.group, s.dim, generator=draw)
    query = query.to(device, DTYPES[s.dtype]).transpose(1, 2)  # heads behind tokens, as models have them
    logits = torch.randn(s.heads * s.group, generator=draw).to(device) if s.sinks else None
    visibility = Visibility(start, s.queries, None, 0, True, s.window)
    return Problem(query, pages, tokens, visibility, Scoring(s.dim**-0.5, s.softcap, logits), packed, places)


def in_float64(p: Problem) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Output ``[B, q, Hq, Dv]``, log-sum-exp ``[B, Hq, q]`` and sums of probabilities ``[B, Hq, n + m]``."""
    batch, heads = p.tokens.keys.shape[:2]
    keys, values = (x.double().cpu().flatten(0, 1) for x in (p.tokens.keys, p.tokens.values))
    at = p.places.repeat_interleave(heads, 0)
    if p.packed is not None:
        keys, values, at = (torch.cat([held, x], 1) for held, x in zip(p.packed, (keys, values, at), strict=True))
    query = p.query.double().cpu()
    scores = torch.einsum("rgqd,rnd->rgqn", query.unflatten(1, (heads, -1)).flatten(0, 1), keys) * p.scoring.scaling
    if p.scoring.softcap is not None:
        scores = p.scoring.softcap * torch.tanh(scores / p.scoring.softcap)
    query_at = p.visibility.start + torch.arange(query.shape[2])[None, :, None]
    hidden = (at[:, None] > query_at) | (at[:, None] < 0)
    if p.visibility.window is not None:
        hidden |= at[:, None] <= query_at - p.visibility.window
    scores = scores.masked_fill(hidden[:, None], -torch.inf)
    total = scores.logsumexp(-1)
    if p.scoring.sink_logits is not None:
        sinks = p.scoring.sink_logits.double().cpu().view(heads, -1).repeat(batch, 1)[:, :, None]
        total = torch.logaddexp(total, sinks.expand_as(total))
    weights = (scores - total.masked_fill(total == -torch.inf, 0.0)[..., None]).exp()
    output = torch.einsum("rgqn,rnd->rgqd", weights, values)
    shape = (batch, query.shape[1], query.shape[2])
    return output.reshape(*shape, -1).transpose(1, 2), total.reshape(shape), weights.sum(2).reshape(*shape[:2], -1)


def want_kernel(settings: Settings, op: str, *call: Any) -> None:
    """Fail if a call that the kernels are meant for would be left to the reference."""
    if settings.kernels:
        module = implementation(op, settings.device)
        assert module is not None and module.supports(*call), f"{op} is left to the reference"


def attention(s: Sizes, settings: Settings, seed: int) -> Figures:
    """``decode``, or for more queries ``extend``."""
    p = problem_of(s, settings.device, seed)
    want_kernel(settings, "decode" if s.queries <= MOST_DECODED_QUERIES else "extend", *p.call[:4])
    found, again = attend(*p.call, s.sums), attend(*p.call, s.sums)
    output, log_sum_exp, sums = in_float64(p)
    figures = compared(found, again, output, log_sum_exp)
    if s.sums:
        figures["sums_error"] = relative(joined(found.page_sums, found.dense_sums), sums)
    return figures


def sums_alone(s: Sizes, settings: Settings, seed: int) -> Figures:
    """``column_sums``."""
    p = problem_of(s, settings.device, seed)
    want_kernel(settings, "column_sums", *p.call[:4])
    _, log_sum_exp, wanted = in_float64(p)
    log_sum_exp = log_sum_exp.float().to(settings.device)
    found, again = (joined(*column_sums(p.query, log_sum_exp, *p.call[1:])) for _ in range(2))
    return alone(found, again, wanted)


def joined(*parts: torch.Tensor | None) -> torch.Tensor:
    """The parts that there are, side by side on the CPU."""
    return torch.cat([part.cpu() for part in parts if part is not None], -1)


def alone(found: torch.Tensor, again: torch.Tensor, wanted: torch.Tensor) -> Figures:
    """Errors of a result that is one tensor, and whether a second call gave the same bits."""
    return {
        "relative_error": relative(found, wanted),
        "largest_error": largest(found, wanted),
        "finite": bool(found.isfinite().all()),
        "same_again": same_bits(found, again),
    }


def same_bits(found: torch.Tensor, again: torch.Tensor) -> bool:
    return torch.equal(again.view(torch.uint8), found.view(torch.uint8))


def compared(found: Attention, again: Attention, output: torch.Tensor, log_sum_exp: torch.Tensor) -> Figures:
    """Errors of a result, and whether a second call gave the same bits: if not, suspect a race."""
    return {
        "relative_error": relative(found.output, output),
        "largest_error": largest(found.output, output),
        "log_sum_exp_error": largest(found.log_sum_exp, log_sum_exp),
        "finite": bool(found.output.isfinite().all()),
        "same_again": same_bits(found.output, again.output),
    }


@dataclass(frozen=True)
class LatentSizes:
    """A call of absorbed latent attention; the widths are those of DeepSeek-V3."""

    latents: str
    rotary: str | None
    heads: int
    queries: int = 1
    dtype: str = "bf16"
    masked: bool = False

    def __str__(self) -> str:
        masked = " masked" if self.masked else ""
        return f"{self.latents}+{self.rotary} {self.dtype} heads={self.heads} queries={self.queries}{masked}"


def latent(s: LatentSizes, settings: Settings, seed: int) -> Figures:
    """``latent_decode`` on a batch of two."""
    draw, dtype, device = torch.Generator().manual_seed(seed), DTYPES[s.dtype], settings.device
    rank, rotary, page, columns, slots = (64, 16, 16, 3, 40) if settings.tiny else (512, 64, 128, 9, 168)
    options = {"group_size": 64} if s.latents == "rotated4" else {}
    codec = LatentCodec(resolve(s.latents, **options), None if s.rotary is None else resolve(s.rotary))
    tokens = slots + columns * page
    start = tokens - s.queries
    latents, turned = (torch.randn(2, 1, tokens, n, generator=draw).to(device, dtype) for n in (rank, rotary))
    storage = filled(PageEncoder(codec, rank, rotary, page, dtype), latents, turned, 4, slots, columns)
    pages = storage.pages()
    assert pages is not None
    query = torch.randn(2, s.heads, s.queries, rank + rotary, generator=draw).to(device, dtype)
    hidden = torch.rand(2, 1, s.queries, tokens, generator=draw) < (0.2 if s.masked else 0.0)
    hidden[..., 0] = False
    at = torch.from_numpy(storage.dense.positions[:, :slots].copy())
    dense = DenseTokens(storage.dense.keys[:, :, :slots], storage.dense.values[:, :, :slots], at.to(device))
    visibility = Visibility(start, s.queries, ~hidden.to(device) if s.masked else None, 0, True, None)
    scoring = Scoring((rank + rotary) ** -0.5)
    want_kernel(settings, "latent_decode", query, pages, dense, visibility, scoring, False)
    found, again = (latent_attend(query, pages, dense, visibility, scoring) for _ in range(2))
    keys, rotary_keys = (
        torch.cat([held_in_pages(storage, side), x[:, 0].double().cpu()], 1)
        for side, x in (("keys", dense.keys), ("values", dense.values))
    )
    places = torch.cat([pages.positions(0, columns).flatten(1).cpu(), at], 1)[:, None, None]
    scores = torch.einsum("bhqd,bnd->bhqn", query.double().cpu(), torch.cat([keys, rotary_keys], -1)) * scoring.scaling
    later = places > (start + torch.arange(s.queries))[:, None]
    masked = hidden.gather(-1, places.expand(2, 1, s.queries, -1))
    scores = scores.masked_fill(later | masked, -torch.inf)
    output = torch.einsum("bhqn,bnd->bqhd", scores.softmax(-1), keys)
    return compared(found, again, output, scores.logsumexp(-1))


def hadamard(dim: int, dtype: str, kind: Any, inverse: bool, settings: Settings, seed: int) -> Figures:
    """``hadamard``."""
    x = torch.randn(3, 7, 33, dim, generator=torch.Generator().manual_seed(seed)).to(DTYPES[dtype])
    fmt = SideFormat(dim, 4, rotation=kind)
    want_kernel(settings, "hadamard", x, fmt)
    matrix = rotation_matrix(dim, kind, torch.float64, CPU)
    assert matrix is not None
    there = x.to(settings.device)
    found, again = (rotate(there, fmt, inverse) for _ in range(2))
    return alone(found, again, x.double() @ (matrix.T if inverse else matrix))


def packing(codec: str, dim: int, settings: Settings, seed: int) -> Figures:
    """``pack``: pages packed on the device and by the reference, and the decoding of the former.

    Only decoding has one right result: a code on the edge between two levels may come out the other way.
    """
    draw, page, count = torch.Generator().manual_seed(seed), 128, 6
    keys, values = (torch.randn(count, page, dim, generator=draw).bfloat16() for _ in range(2))
    encoder = PageEncoder(resolve(codec), dim, dim, page, torch.bfloat16)
    layout, device = encoder.layout, settings.device
    with backend("reference"):
        mean = rotate(keys.float().mean(1), layout.sides["keys"]) if encoder.centered else None
        here = encoder.encode(keys, values, mean)
    given = keys.to(device), values.to(device), None if mean is None else mean.to(device)
    there, again = encoder.encode(*given), encoder.encode(*given)
    figures: Figures = {"bytes_alike": (there.cpu() == here).double().mean().item()}
    figures["same_again"] = same_bits(there, again)
    errors, finite = [], True
    for side, original in (("keys", keys), ("values", values)):
        fmt = layout.sides[side]
        out = torch.full((count, page, fmt.dim), torch.nan)
        plain, plain_there = (decode_in_torch(layout, side, x, out.clone()).float() for x in (here, there.cpu()))
        decoded, twice = (decode_side(layout, side, there, out.to(device)).float().cpu() for _ in range(2))
        finite &= bool(decoded.isfinite().all())
        figures["same_again"] &= same_bits(decoded, twice)
        errors.append(relative(decoded, plain_there))
        with backend("reference"):
            rotated = rotate(original.float(), fmt)
        rotated = rotated - mean.unsqueeze(1) if side == "keys" and mean is not None else rotated
        figures[f"{side}_rounding_here"] = relative(plain, rotated)
        figures[f"{side}_rounding_there"] = relative(plain_there, rotated)
    return figures | {"relative_error": max(errors), "finite": finite}


def cases(settings: Settings) -> list[Case]:
    """All cases, the most important first."""
    listed: list[tuple[str, str, Callable[..., Figures]]] = []
    for s in (*decoding_sizes(), *extending_sizes()):
        s = s.made_tiny() if settings.tiny else s
        listed.append((f"attend {s}", s.dtype, partial(attention, s)))
    for codec in ("unbiased4", "none", "rotated8"):
        for dtype in ("bf16", "fp32"):
            s = Sizes(codec, dtype, queries=64, slots=200, positions=True)
            s = s.made_tiny() if settings.tiny else s
            listed.append((f"column_sums {s}", dtype, partial(sums_alone, s)))
    for own in latent_sizes():
        listed.append((f"latent_attend {own}", own.dtype, partial(latent, own)))
    for dim, dtype in ((64, "fp32"), (128, "fp32"), (256, "fp32"), (512, "bf16"), (128, "fp16")):
        for kind, inverse in (("hadamard", False), ("signed_hadamard", True)):
            name = f"hadamard {dtype} {dim} {kind}{' inverse' if inverse else ''}"
            listed.append((name, dtype, partial(hadamard, dim, dtype, kind, inverse)))
    for codec in specs():
        for dim in (32,) if settings.tiny else (64, 128):
            listed.append((f"pack fp32 {codec} {dim}", "fp32", partial(packing, codec, dim)))
    found = [Case(n, dtype, partial(run, settings=settings, seed=seed)) for seed, (n, dtype, run) in enumerate(listed)]
    # Tiny sizes make some cases the same.
    return [case for case in {case.name: case for case in found}.values() if settings.only in case.name]


def decoding_sizes() -> list[Sizes]:
    """Calls of few queries: the default codecs in every way, the others in one, and what else a call may have."""
    found = [Sizes(codec) for codec in DEFAULTS]
    for codec in DEFAULTS:
        plain = Sizes(codec)
        found += [
            replace(plain, dtype="fp16"),
            replace(plain, dtype="fp32"),
            replace(plain, dim=64),
            replace(plain, dim=64, heads=3, group=3, dtype="fp32"),
            replace(plain, group=1),
            replace(plain, batch=3, ragged=True),
            replace(plain, queries=5, positions=True),
        ]
    found += [Sizes(codec) for codec in specs() if codec not in DEFAULTS]
    packed, dense = Sizes("unbiased4"), Sizes("none")
    found += [replace(packed, codec=None), replace(packed, page=64), replace(packed, page=24)]
    for plain in (packed, dense):
        found += [
            replace(plain, columns=1),
            replace(plain, columns=70),
            replace(plain, group=8),
            replace(plain, queries=16),
            replace(plain, dim=80),
            replace(plain, dim=96, value_dim=64),
            replace(plain, dim=256),
            replace(plain, window=300),
            replace(plain, softcap=30.0),
            replace(plain, sinks=True),
            replace(plain, sums=True),
            replace(plain, sums=True, ragged=True, batch=2),
            replace(plain, batch=8, columns=20),
            replace(plain, slots=1, columns=3),
        ]
    return found


def extending_sizes() -> list[Sizes]:
    """Calls of many queries."""
    found = [Sizes(codec, queries=300, slots=430, positions=True) for codec in DEFAULTS]
    for codec in ("unbiased4", "none"):
        plain = Sizes(codec, queries=300, slots=430, positions=True)
        found += [
            replace(plain, dtype="fp32"),
            replace(plain, dim=64),
            replace(plain, window=200),
            replace(plain, ragged=True, batch=2),
            replace(plain, sums=True),
            replace(plain, columns=40),
        ]
    return found


def latent_sizes() -> list[LatentSizes]:
    """Calls of absorbed latent attention, with the heads of DeepSeek-V3 and of V2-Lite."""
    found = []
    pairs = (("none", None), ("rotated8", None), ("rotated4", "int8"), ("fp8", "fp8"), ("turboquant4", "bf16"))
    for latents, rotary in pairs:
        found += [
            LatentSizes(latents, rotary, 128),
            LatentSizes(latents, rotary, 16),
            LatentSizes(latents, rotary, 16, queries=3, masked=True),
            LatentSizes(latents, rotary, 16, dtype="fp32"),
        ]
    return found
