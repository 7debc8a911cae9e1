"""The methods of encoding inside the Triton kernel. The codecs in ``hf_kvcache/codecs`` define and explain them.

Every method takes ``x``, fp32 ``[block, dim_pad]`` by places with 0 where there is no token or no channel, writes the
scales of its tokens, and returns their codes, int32 of the same shape.
"""

from __future__ import annotations

import triton
import triton.language as tl

from hf_kvcache.kernels.triton.encode_side import as_scale, keep, store_by_channel, store_by_token

#: 1.5 * 2**23: adding and subtracting it rounds to the nearest whole number, ties to even, as torch does.
_ROUNDER = tl.constexpr(12582912.0)
_SCALE_MIN = tl.constexpr(2.0**-14)
_TINY = tl.constexpr(1e-6)
_POOR = tl.constexpr(0.75)
_FLOAT8_MAX = tl.constexpr(448.0)
_ITERATIONS = tl.constexpr(16)


@triton.jit
def scale_and_zero(low, high, bits: tl.constexpr):
    """The scale and the zero point, in half precision, of numbers between ``low`` and ``high``."""
    zero = as_scale(low)
    most: tl.constexpr = (1 << bits) - 1
    steps = tl.full(high.shape, most, tl.float32)
    return as_scale(tl.maximum(tl.div_rn(high - zero.to(tl.float32), steps), _SCALE_MIN)), zero


@triton.jit
def round_to_codes(x, scale, zero, bits: tl.constexpr):
    """The codes of numbers, given a scale and a zero point in fp32 that broadcast."""
    most: tl.constexpr = (1 << bits) - 1
    steps = tl.div_rn(x - zero, scale + tl.zeros_like(x))
    steps = tl.minimum(tl.maximum(steps, 0.0), most * 1.0)
    return ((steps + _ROUNDER) - _ROUNDER).to(tl.int32)


@triton.jit
def integers_by_channel(x, record, group, real, there, side: tl.constexpr):
    """Asymmetric integers, a scale and a zero point for each channel of a group of tokens."""
    low, high = x, x
    if side.tokens != side.block:
        low = tl.where(real[:, None], x, float("inf"))
        high = tl.where(real[:, None], x, float("-inf"))
    scale, zero = scale_and_zero(tl.min(low, 0), tl.max(high, 0), side.bits)
    store_by_channel(record, side.scale_at, scale, group, side)
    store_by_channel(record, side.zero_at, zero, group, side)
    return round_to_codes(x, scale.to(tl.float32)[None, :], zero.to(tl.float32)[None, :], side.bits)


@triton.jit
def integers_by_token(x, record, token, real, there, side: tl.constexpr):
    """Asymmetric integers, a scale and a zero point for each token."""
    low, high = x, x
    if side.dim != side.dim_pad:
        low, high = tl.where(there[None, :], x, float("inf")), tl.where(there[None, :], x, float("-inf"))
    scale, zero = scale_and_zero(tl.min(low, 1), tl.max(high, 1), side.bits)
    store_by_token(record, side.scale_at, scale, token, real)
    store_by_token(record, side.zero_at, zero, token, real)
    return round_to_codes(x, scale.to(tl.float32)[:, None], zero.to(tl.float32)[:, None], side.bits)


@triton.jit
def integers_by_group(x, record, token, real, side: tl.constexpr):
    """Asymmetric integers, a scale and a zero point for each group of channels of a token. Groups lie in segments."""
    GROUPS: tl.constexpr = side.dim_pad // (side.segments * side.group)
    # Neighboring places belong to different segments, so a group is every `segments`-th place of a stretch.
    grouped = tl.reshape(x, [side.block, GROUPS, side.group, side.segments])
    scale, zero = scale_and_zero(tl.min(grouped, 2), tl.max(grouped, 2), side.bits)
    place, i = tl.arange(0, side.segments), tl.arange(0, GROUPS)
    if side.bits == 3:
        place = 2 * (place % 4) + place // 4
    in_segment: tl.constexpr = side.segment // side.group
    cell = (token * (side.dim // side.group))[:, None, None] + (place * in_segment)[None, None, :] + i[None, :, None]
    mask = real[:, None, None] & (i < in_segment)[None, :, None]
    tl.store((record + side.scale_at).to(tl.pointer_type(tl.float16)) + cell, scale, mask=mask)
    tl.store((record + side.zero_at).to(tl.pointer_type(tl.float16)) + cell, zero, mask=mask)
    code = round_to_codes(
        grouped, tl.expand_dims(scale.to(tl.float32), 2), tl.expand_dims(zero.to(tl.float32), 2), side.bits
    )
    return tl.reshape(code, [side.block, side.dim_pad])


@triton.jit
def float8(x, record, token, real, side: tl.constexpr):
    """e4m3 with a scale for each token."""
    scale = as_scale(
        tl.maximum(tl.div_rn(tl.max(tl.abs(x), 1), tl.full([side.block], _FLOAT8_MAX, tl.float32)), _SCALE_MIN)
    )
    store_by_token(record, side.scale_at, scale, token, real)
    y = tl.div_rn(x, scale.to(tl.float32)[:, None] + tl.zeros_like(x))
    magnitude = tl.minimum(tl.abs(y), _FLOAT8_MAX)
    bits = magnitude.to(tl.int32, bitcast=True)
    # To nearest, ties to even: 20 bits of the fraction go, and the exponent's bias falls from 127 to 7.
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - (120 << 3)
    # Below 2**-6 steps are 2**-9, which is the last bit of numbers from 2**14 on.
    small = (magnitude + 16384.0).to(tl.int32, bitcast=True) - 0x46800000
    sign = (y.to(tl.int32, bitcast=True) >> 24) & 0x80
    return tl.where(magnitude < 2.0**-6, small, normal) | sign


@triton.jit
def nearest(y, side: tl.constexpr):
    """The levels nearest to ``y``, which carry their codes: see :func:`codes_of`."""
    levels: tl.constexpr = side.levels
    edges: tl.constexpr = side.edges
    size = tl.abs(y)
    # One by one: a comparison and a choice take their constants as part of the instruction, and no registers.
    level = tl.full(y.shape, levels[0], tl.float32)
    for i in tl.static_range(len(edges)):
        level = tl.where(size > edges[i], levels[i + 1], level)
    return tl.where(y > 0, level, -level)


@triton.jit
def codes_of(level, side: tl.constexpr):
    """The codes of levels that :func:`nearest` gave: the last bits of positive ones, turned over in negative ones."""
    number, most = level.to(tl.int32, bitcast=True), (1 << side.bits) - 1
    return (number ^ (number >> 31)) & most


@triton.jit
def unbiased_gain(x, approximation, axis: tl.constexpr):
    """The factor of each token that makes ``<x, factor * approximation>`` equal ``<x, x>``; less for a poor one."""
    product = tl.sum(x * approximation, axis)
    square = tl.sum(x * x, axis)
    other = tl.maximum(tl.sum(approximation * approximation, axis), _TINY * _TINY)
    # The cosine is compared by its square.
    good = (product > 0) & (product * product >= _POOR * _POOR * square * other)
    poor = tl.maximum(product, 0.0) / (other * (_POOR * _POOR))
    return tl.where(good, square / tl.where(good, product, 1.0), poor)


@triton.jit
def norms(x, record, token, real, there, side: tl.constexpr):
    """TurboQuant: levels of the direction, and a scale that gives the decoded vector the length of the original."""
    norm = tl.sqrt(tl.sum(x * x, 1))
    inverse = tl.sqrt(side.dim * 1.0) / tl.maximum(norm, 1e-12)
    level = keep(nearest(x * inverse[:, None], side), real, there, side)
    decoded = tl.sqrt(tl.sum(level * level, 1))
    store_by_token(record, side.scale_at, as_scale(norm / tl.where(real, decoded, 1.0)), token, real)
    return codes_of(level, side)


@triton.jit
def unbiased_values(x, record, token, real, there, side: tl.constexpr):
    """A scale for each token."""
    scale = tl.maximum(tl.sqrt(tl.sum(x * x, 1) / side.dim), _TINY)
    level = keep(nearest(x * (1.0 / scale)[:, None], side), real, there, side)
    fitted = tl.sum(x * level, 1) / tl.where(real, tl.sum(level * level, 1), 1.0)
    scale = tl.maximum(as_scale(fitted).to(tl.float32), _TINY)
    level = keep(nearest(x * (1.0 / scale)[:, None], side), real, there, side)
    gain = unbiased_gain(x, level, 1)
    store_by_token(record, side.scale_at, as_scale(gain), token, real)
    return codes_of(level, side)


@triton.jit
def unbiased_keys(x, record, token, real, there, side: tl.constexpr):
    """A scale and a zero point for each channel, and a gain for each token. Tiles are turned: ``[dim_pad, block]``.

    Registers hold ``x`` and its levels, and what else has their size is made anew each time: hence sums in one pass,
    of numbers less about their mean, and codes from levels.
    """
    inverse, scale, zero = _standardize(x, real, there, side)
    level = _levels(x, inverse, scale, zero, real, there, side)
    # Not about `zero` itself: the compiler would keep the differences that the levels were found from, one more tile.
    scale, zero = _fit_line(level, x, inverse, zero + scale, real, there, side)
    fitted = level * scale[:, None] + zero[:, None]
    fitted_gain = tl.sum(x * fitted, 0) / tl.maximum(tl.sum(fitted * fitted, 0), _TINY)
    inverse = tl.where(fitted_gain * inverse > 0.25, 1.0 / tl.maximum(fitted_gain, _TINY), inverse)
    scale, zero = tl.maximum(as_scale(scale).to(tl.float32), _TINY), as_scale(zero).to(tl.float32)
    level = _levels(x, inverse, scale, zero, real, there, side)
    scale, zero = _fit_line(level, x, inverse, zero + scale, real, there, side)
    store_by_channel(record, side.scale_at, as_scale(scale), 0, side)
    store_by_channel(record, side.zero_at, as_scale(zero), 0, side)
    # The gain is fitted last, to the vectors as they will be decoded.
    decoded = level * as_scale(scale).to(tl.float32)[:, None] + as_scale(zero).to(tl.float32)[:, None]
    store_by_token(record, side.other_at, as_scale(unbiased_gain(x, decoded, 0)), token, real)
    return tl.trans(codes_of(level, side))


@triton.jit
def _levels(x, inverse, scale, zero, real, there, side: tl.constexpr):
    """The levels of ``(x * inverse - zero) / scale``, 0 where there is no token or no channel."""
    level = nearest((x * inverse[None, :] - zero[:, None]) * (1.0 / scale)[:, None], side)
    return keep(level, real, there, side)


@triton.jit
def _standardize(x, real, there, side: tl.constexpr):
    """The inverse of a gain for each token, and a scale and a mean for each channel, with entries close to N(0, 1)."""
    inverse = tl.full([side.block], 1.0, tl.float32)
    mean, scale = _moments(x, inverse, tl.sum(x, 1) / side.page, real, there, side)
    for _ in tl.static_range(2):
        y = (x * inverse[None, :] - mean[:, None]) * (1.0 / scale)[:, None]
        # The gain grows by the root of the mean square, and is 1e-4 at least.
        inverse = 1.0 / tl.maximum(tl.sqrt(tl.sum(y * y, 0) / side.dim) / inverse, 1e-4)
        mean, scale = _moments(x, inverse, mean, real, there, side)
    return inverse, scale, mean


@triton.jit
def _moments(x, inverse, near, real, there, side: tl.constexpr):
    """The mean and the standard deviation of each channel of ``x * inverse``; ``near`` is a number near the mean."""
    y = keep(x * inverse[None, :] - near[:, None], real, there, side)
    mean = tl.sum(y, 1) / side.page
    variance = tl.sum(y * y, 1) / side.page - mean * mean
    return near + mean, tl.maximum(tl.sqrt(tl.maximum(variance, 0.0)), _TINY)


@triton.jit
def _fit_line(level, x, inverse, near, real, there, side: tl.constexpr):
    """Scale and zero of each channel that bring ``level * scale + zero`` closest to ``x * inverse``.

    ``near`` is a number near the mean of ``x * inverse``. The mean of the levels is near 0.
    """
    y = keep(x * inverse[None, :] - near[:, None], real, there, side)
    level_mean, mean = tl.sum(level, 1) / side.page, tl.sum(y, 1) / side.page
    covariance = tl.sum(level * y, 1) / side.page - level_mean * mean
    variance = tl.sum(level * level, 1) / side.page - level_mean * level_mean
    scale = tl.maximum(covariance / tl.maximum(variance, _TINY / side.page), _TINY)
    return scale, near + mean - scale * level_mean


@triton.jit
def evened(x, record, token, real, there, side: tl.constexpr):
    """KVarN: integers of a page whose rows and columns have been scaled to like standard deviations."""
    row, column = _normalize_variance(x, real, there, side)
    if side.channel:
        other = as_scale(tl.exp(row))
        store_by_token(record, side.other_at, other, token, real)
        y = tl.div_rn(x, other.to(tl.float32)[:, None] + tl.zeros_like(x))
        return integers_by_channel(y, record, 0, real, there, side)
    else:
        other = as_scale(tl.exp(column))
        store_by_channel(record, side.other_at, other, 0, side)
        y = tl.div_rn(x, other.to(tl.float32)[None, :] + tl.zeros_like(x))
        return integers_by_token(y, record, token, real, there, side)


@triton.jit
def _normalize_variance(x, real, there, side: tl.constexpr):
    """Logarithms of the scales of rows and columns: of 17 iterates, the one with the most even deviations."""
    log_row, log_column = tl.full([side.block], 0.0, tl.float32), tl.full([side.dim_pad], 0.0, tl.float32)
    best_row, best_column = log_row, log_column
    best = tl.max(log_row, 0) + float("inf")
    for _ in range(0, _ITERATIONS + 1):
        column = _deviations(x, log_row, log_column, 0, side.page)
        row = _deviations(x, log_row, log_column, 1, side.dim)
        spread = _ratio(column, there) * _ratio(row, real)
        better = spread < best
        best = tl.where(better, spread, best)
        best_row, best_column = tl.where(better, log_row, best_row), tl.where(better, log_column, best_column)
        log_column = tl.minimum(tl.maximum(log_column + tl.log(column), -0.3), 10.0)
        row = _deviations(x, log_row, log_column, 1, side.dim)
        log_row = tl.minimum(tl.maximum(log_row + tl.log(row), -0.3), 10.0)
    return best_row, best_column


@triton.jit
def _deviations(x, log_row, log_column, axis: tl.constexpr, count: tl.constexpr):
    """Standard deviations of the columns (``axis=0``) or the rows of ``x`` over the scales, from 1e-3 to 1e3."""
    if axis == 0:
        own, y = tl.exp(-log_column), x * tl.exp(-log_row)[:, None]
    else:
        own, y = tl.exp(-log_row), x * tl.exp(-log_column)[None, :]
    mean = tl.sum(y, axis) / count
    variance = tl.maximum(tl.sum(y * y, axis) / count - mean * mean, 0.0)
    return tl.minimum(tl.maximum(own * tl.sqrt(variance), 1e-3), 1e3)


@triton.jit
def _ratio(deviation, exists):
    """The largest of some numbers over the smallest, of those that exist."""
    return tl.max(tl.where(exists, deviation, 0.0), 0) / tl.min(tl.where(exists, deviation, float("inf")), 0)
