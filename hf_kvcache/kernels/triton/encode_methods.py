"""The methods of encoding inside the Triton kernel. The codecs in ``hf_kvcache/codecs`` define and explain them.

Every method takes ``x``, fp32 ``[block, dim_pad]`` by places with 0 where there is no token or no channel, writes the
scales of its tokens, and returns their codes, int32 of the same shape.
"""

from __future__ import annotations

import triton
import triton.language as tl

from hf_kvcache.kernels.triton.encode_side import as_scale, keep, places, store_by_channel, store_by_token

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
    scale = as_scale(tl.maximum(tl.div_rn(tl.max(tl.abs(x), 1), tl.full([side.block], _FLOAT8_MAX, tl.float32)), _SCALE_MIN))
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
    """The levels nearest to ``y``, and their codes. Levels are symmetric about 0: the magnitude is looked up."""
    table: tl.constexpr = side.table
    half: tl.constexpr = 1 << (side.bits - 1)
    size = tl.abs(y)
    if side.bits == 1:
        level = tl.full(y.shape, table[half], tl.float32)
        index = tl.zeros(y.shape, tl.int32)
    elif side.bits == 2:
        level, index = _of_two(size, half, side)
    elif side.bits == 3:
        level, index = _of_four(size, half, side)
    else:
        upper_level, upper = _of_four(size, half + 4, side)
        lower_level, lower = _of_four(size, half, side)
        high = size > (table[half + 3] + table[half + 4]) / 2
        level, index = tl.where(high, upper_level, lower_level), tl.where(high, upper + 4, lower)
    positive = y > 0
    return tl.where(positive, level, -level), tl.where(positive, half + index, half - 1 - index)


@triton.jit
def _of_two(size, first: tl.constexpr, side: tl.constexpr):
    """Of levels ``first`` and the next one, the nearest to ``size``, and whether it is the second one, as int32."""
    table: tl.constexpr = side.table
    high = size > (table[first] + table[first + 1]) / 2
    return tl.where(high, table[first + 1], table[first]), high.to(tl.int32)


@triton.jit
def _of_four(size, first: tl.constexpr, side: tl.constexpr):
    """Of level ``first`` and the next three, the nearest to ``size``, and its number among them."""
    table: tl.constexpr = side.table
    upper_level, upper = _of_two(size, first + 2, side)
    lower_level, lower = _of_two(size, first, side)
    high = size > (table[first + 1] + table[first + 2]) / 2
    return tl.where(high, upper_level, lower_level), tl.where(high, upper + 2, lower)


@triton.jit
def unbiased_gain(x, approximation):
    """fp32 ``[block]``: the factor of each token that makes ``<x, factor * approximation>`` equal ``<x, x>``."""
    length = tl.sqrt(tl.sum(x * x, 1))
    other = tl.maximum(tl.sqrt(tl.sum(approximation * approximation, 1)), _TINY)
    cosine = tl.sum(x * approximation, 1) / tl.maximum(length * other, _TINY)
    slope = tl.where(cosine >= _POOR, 1.0 / tl.maximum(cosine, _POOR), tl.maximum(cosine, 0.0) / (_POOR * _POOR))
    return slope * length / other


@triton.jit
def norms(x, record, token, real, there, side: tl.constexpr):
    """TurboQuant: levels of the direction, and a scale that gives the decoded vector the length of the original."""
    norm = tl.sqrt(tl.sum(x * x, 1))
    inverse = tl.sqrt(side.dim * 1.0) / tl.maximum(norm, 1e-12)
    level, code = nearest(x * inverse[:, None], side)
    level = keep(level, real, there, side)
    decoded = tl.sqrt(tl.sum(level * level, 1))
    store_by_token(record, side.scale_at, as_scale(norm / tl.where(real, decoded, 1.0)), token, real)
    return code


@triton.jit
def unbiased_values(x, record, token, real, there, side: tl.constexpr):
    """A scale for each token."""
    scale = tl.maximum(tl.sqrt(tl.sum(x * x, 1) / side.dim), _TINY)
    level, code = nearest(x * (1.0 / scale)[:, None], side)
    level = keep(level, real, there, side)
    fitted = tl.sum(x * level, 1) / tl.where(real, tl.sum(level * level, 1), 1.0)
    scale = tl.maximum(as_scale(fitted).to(tl.float32), _TINY)
    level, code = nearest(x * (1.0 / scale)[:, None], side)
    gain = unbiased_gain(x, keep(level, real, there, side))
    store_by_token(record, side.scale_at, as_scale(gain), token, real)
    return code


@triton.jit
def unbiased_keys(x, record, token, real, there, side: tl.constexpr):
    """A scale and a zero point for each channel, and a gain for each token."""
    gain, scale, zero = _standardize(x, real, there, side)
    level, code = nearest((x * (1.0 / gain)[:, None] - zero[None, :]) * (1.0 / scale)[None, :], side)
    level = keep(level, real, there, side)
    scale, zero = _fit_line(level, x, 1.0 / gain, real, there, side)
    fitted = level * scale[None, :] + zero[None, :]
    fitted_gain = tl.sum(x * fitted, 1) / tl.maximum(tl.sum(fitted * fitted, 1), _TINY)
    inverse = 1.0 / tl.where(fitted_gain > gain / 4, fitted_gain, gain)
    scale, zero = tl.maximum(as_scale(scale).to(tl.float32), _TINY), as_scale(zero).to(tl.float32)
    level, code = nearest((x * inverse[:, None] - zero[None, :]) * (1.0 / scale)[None, :], side)
    level = keep(level, real, there, side)
    scale, zero = _fit_line(level, x, inverse, real, there, side)
    store_by_channel(record, side.scale_at, as_scale(scale), 0, side)
    store_by_channel(record, side.zero_at, as_scale(zero), 0, side)
    # The gain is fitted last, to the vectors as they will be decoded.
    decoded = level * as_scale(scale).to(tl.float32)[None, :] + as_scale(zero).to(tl.float32)[None, :]
    store_by_token(record, side.other_at, as_scale(unbiased_gain(x, decoded)), token, real)
    return code


@triton.jit
def _standardize(x, real, there, side: tl.constexpr):
    """A gain for each token, and a scale and a mean for each channel, that make the entries close to N(0, 1)."""
    gain = tl.full([side.block], 1.0, tl.float32)
    mean, scale = _moments(x, real, there, side)
    for _ in tl.static_range(2):
        y = (x - mean[None, :] * gain[:, None]) * (1.0 / scale)[None, :]
        gain = tl.maximum(tl.sqrt(tl.sum(y * y, 1) / side.dim), 1e-4)
        mean, scale = _moments(x * (1.0 / gain)[:, None], real, there, side)
    return gain, scale, mean


@triton.jit
def _moments(y, real, there, side: tl.constexpr):
    """The mean and the standard deviation of each channel."""
    mean = tl.sum(y, 0) / side.page
    y = keep(y - mean[None, :], real, there, side)
    return mean, tl.maximum(tl.sqrt(tl.sum(y * y, 0) / side.page), _TINY)


@triton.jit
def _fit_line(level, x, inverse, real, there, side: tl.constexpr):
    """Scale and zero of each channel that bring ``level * scale + zero`` closest to ``x * inverse``."""
    level_mean = tl.sum(level, 0) / side.page
    y = x * inverse[:, None]
    y_mean = tl.sum(y, 0) / side.page
    spread = keep(level - level_mean[None, :], real, there, side)
    covariance = tl.sum(spread * (y - y_mean[None, :]), 0)
    scale = tl.maximum(covariance / tl.maximum(tl.sum(spread * spread, 0), _TINY), _TINY)
    return scale, y_mean - scale * level_mean


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
    log_row, log_column = tl.zeros([side.block], tl.float32), tl.zeros([side.dim_pad], tl.float32)
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
