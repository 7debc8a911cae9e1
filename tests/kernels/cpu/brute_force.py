"""Attention in float64 as the definition has it, over pages that are decoded from their bytes with numpy."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from hf_kvcache.kernels.hadamard import rotation_matrix
from hf_kvcache.kernels.inputs import Pages
from hf_kvcache.kernels.page import PageLayout, SideFormat
from tests.kernels.bytes_by_hand import PLANES
from tests.kernels.cpu.cases import Call


class Expected(NamedTuple):
    """The expected result in float64. There are always attention sums, ``[B, Hq, 0]`` without pages."""

    output: torch.Tensor
    log_sum_exp: torch.Tensor
    page_sums: torch.Tensor
    dense_sums: torch.Tensor


def decode_record(layout: PageLayout, side: str, record: np.ndarray) -> np.ndarray:
    """One side of a record ``[record_bytes]``, float64 ``[P, D]`` in the rotated basis."""
    fmt = layout.sides[side]

    def halves(name: str) -> np.ndarray:
        field = layout.fields[f"{side}.{name}"]
        return _slice(record, field.offset, field.nbytes).view(np.float16).astype(np.float64).reshape(field.shape)

    field = layout.fields[f"{side}.codes"]
    levels = _levels(fmt, _slice(record, field.offset, field.nbytes).reshape(layout.page_size, -1))
    if fmt.level == "dense":
        return levels
    axis = 0 if fmt.axis == "channel" else 1
    x = levels * halves("scale").repeat(fmt.group, axis)
    if fmt.zero:
        x = x + halves("zero").repeat(fmt.group, axis)
    return x * halves("other") if fmt.other else x


def _slice(record: np.ndarray, offset: int, length: int) -> np.ndarray:
    return np.ascontiguousarray(record[offset : offset + length])


def _levels(fmt: SideFormat, raw: np.ndarray) -> np.ndarray:
    """The levels ``[P, D]`` of the codes ``[P, bytes]``, before scaling."""
    if fmt.dense_dtype is not None:
        return torch.from_numpy(raw).view(fmt.dense_dtype).double().numpy()
    if fmt.level == "float8":
        return _float8_numbers()[raw]
    codes = _unpack(raw, fmt.dim, fmt.bits)
    return np.array(fmt.table)[codes] if fmt.level == "table" else codes.astype(np.float64)


def _unpack(raw: np.ndarray, dim: int, bits: int) -> np.ndarray:
    codes, start = np.zeros((len(raw), dim), dtype=np.int64), 0
    for width, lowest in PLANES[bits]:
        length = dim * width // 8
        segment, byte = np.divmod(np.arange(dim), length)
        codes += (raw[:, start + byte].astype(np.int64) >> (segment * width)) % 2**width << lowest
        start += length
    return codes


def _float8_numbers() -> np.ndarray:
    byte = np.arange(256)
    exponent, mantissa = (byte >> 3) & 15, (byte & 7).astype(np.float64)
    size = np.where(exponent == 0, np.ldexp(mantissa, -9), np.ldexp(8 + mantissa, exponent - 10))
    return np.where(byte & 0x80, -size, size)


def attend(call: Call) -> Expected:
    """Attention of ``call``, one KV head of one sequence after the other."""
    batch, query_heads, length, _ = call.query.shape
    heads, slots, value_dim = call.dense.values.shape[1:]
    columns = 0 if call.pages is None else call.pages.columns * call.pages.layout.page_size
    output = np.zeros((batch, length, query_heads, value_dim))
    log_sum_exp = np.zeros((batch, query_heads, length))
    sums = np.zeros((batch, query_heads, columns + slots))
    group = query_heads // heads
    for b in range(batch):
        for head in range(heads):
            keys, values, visible = _tokens(call, b, head)
            bias = _biases(call, b, head)
            for h in range(head * group, (head + 1) * group):
                sink = -np.inf if call.scoring.sink_logits is None else float(call.scoring.sink_logits[h])
                scores = call.query[b, h].double().numpy() @ keys.T * call.scoring.scaling
                if call.scoring.softcap is not None:
                    scores = np.tanh(scores / call.scoring.softcap) * call.scoring.softcap
                scores = np.where(visible, scores + bias, -np.inf)
                probabilities, log_sum_exp[b, h] = _softmax(scores, sink)
                output[b, :, h] = probabilities @ values
                sums[b, h] = probabilities.sum(0)
    tensors = output, log_sum_exp, sums[..., :columns], sums[..., columns:]
    return Expected(*(torch.from_numpy(t) for t in tensors))


def _softmax(scores: np.ndarray, sink: float) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities of ``scores [q, T]`` beside a sink logit, and log-sum-exp ``[q]``; 0 and -inf without a key."""
    top = np.maximum(scores.max(1, initial=-np.inf), sink)
    shift = np.where(top == -np.inf, 0.0, top)[:, None]
    weights = np.exp(scores - shift)
    total = weights.sum(1, keepdims=True) + np.exp(sink - shift)
    with np.errstate(divide="ignore"):
        return weights / np.where(total == 0, 1.0, total), (np.log(total) + shift)[:, 0]


def _tokens(call: Call, b: int, head: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Keys ``[T, Dk]`` and values ``[T, Dv]`` of a KV head, and which of them each query sees, ``[q, T]``."""
    dense = call.dense
    parts = [] if call.pages is None else [_page(call.pages, b * call.pages.heads + head, c) for c in _columns(call)]
    keys = [*(p[0] for p in parts), dense.keys[b, head].double().numpy()]
    values = [*(p[1] for p in parts), dense.values[b, head].double().numpy()]
    visible = [_seen(call, p[2]) & p[3] for p in parts]
    slots = dense.keys.shape[2]
    everyone = np.ones((call.query.shape[2], slots), dtype=bool)
    seen = everyone if dense.positions is None else _seen(call, dense.positions[b].numpy())
    visible.append(seen if dense.unused is None else seen & ~dense.unused[b].numpy())
    return np.concatenate(keys), np.concatenate(values), np.concatenate(visible, 1)


def _biases(call: Call, b: int, head: int) -> np.ndarray:
    """What is added to the scores of each key of a KV head ``[T]``; 0 where there is no token."""
    parts = [np.zeros(call.dense.keys.shape[2])]
    pages = call.pages
    if pages is not None and pages.layout.biased:
        field, row = pages.layout.fields["bias"], b * pages.heads + head
        for column in reversed(_columns(call)):
            bias = np.zeros(pages.layout.page_size)
            if pages.addresses[row, column]:
                stored = _slice(_record(pages, pages.addresses[row, column]), field.offset, field.nbytes)
                count = pages.counts[row, column]
                bias[:count] = stored.view(np.float16)[:count]
            parts.insert(0, bias)
    elif pages is not None:
        parts.insert(0, np.zeros(pages.columns * pages.layout.page_size))
    return np.concatenate(parts)


def _columns(call: Call) -> range:
    assert call.pages is not None
    return range(call.pages.columns)


def _page(pages: Pages, row: int, column: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Keys, values, positions ``[P]`` and which places hold a token ``[P]``; zeros where there is no page."""
    layout, address = pages.layout, pages.addresses[row, column]
    place = np.arange(layout.page_size)
    positions = pages.first[row, column] + place
    if (row, column) in pages.scattered:
        stored = pages.scattered[row, column]
        positions[: len(stored)] = stored
    held = place < (pages.counts[row, column] if address else 0)
    sides = []
    for side, fmt in layout.sides.items():
        if not held.any():
            sides.append(np.zeros((layout.page_size, fmt.dim)))
            continue
        x = decode_record(layout, side, _record(pages, address))
        if side == "keys" and pages.key_mean is not None:
            x = x + pages.key_mean[row].double().numpy()
        rotation = rotation_matrix(fmt.dim, fmt.rotation, torch.float64, torch.device("cpu"))
        x = x if rotation is None else x @ rotation.numpy().T
        if side == "keys" and pages.key_scale is not None:
            x = x * pages.key_scale[row].double().numpy()
        # What lies behind the last token may be anything, infinite too: it has weight 0 here by having no value.
        sides.append(np.where(held[:, None], x, 0.0))
    return sides[0], sides[1], positions, held


def _record(pages: Pages, address: int) -> np.ndarray:
    for slab in pages.slabs:
        index, rest = divmod(int(address) - slab.data_ptr(), slab.shape[1])
        if 0 <= index < slab.shape[0]:
            assert rest == 0
            return slab[index].numpy()
    raise AssertionError("an address outside the slabs")


def _seen(call: Call, positions: np.ndarray) -> np.ndarray:
    """bool ``[q, n]``: which queries see keys at ``positions [n]``."""
    visibility = call.visibility
    query = visibility.start + np.arange(call.query.shape[2])[:, None]
    seen = np.ones((len(query), len(positions)), dtype=bool)
    if visibility.causal:
        seen &= positions <= query
    if visibility.window is not None:
        seen &= positions > query - visibility.window
    return seen
