"""The kernels of a plain decode step over latents in Triton: the projection of the query, and attention in one grid.

:mod:`~hf_kvcache.kernels.triton.latent_kernels` has what they are made of, and the merge behind them.
"""

from __future__ import annotations

import triton
import triton.language as tl

from hf_kvcache.kernels.triton.latent_kernels import dense_kernel, pages_kernel


@triton.jit
def _turn(x, signs, ROWS: tl.constexpr, D: tl.constexpr, LOG_D: tl.constexpr, SIGNED: tl.constexpr):
    """fp32 ``[ROWS, D]`` in the rotated basis, by the transform of ``hadamard.py``."""
    if SIGNED:
        x *= tl.load(signs + tl.arange(0, D))[None, :]
    for _ in tl.static_range(LOG_D):
        left, right = tl.split(tl.reshape(x, [ROWS, D // 2, 2]))
        x = tl.reshape(tl.permute(tl.join(left + right, left - right), (0, 2, 1)), [ROWS, D])
    return x * (1.0 / tl.sqrt(D + 0.0))


@triton.jit
def _store_token(new, new_b, buffer, buffer_b, buffer_n, slot, b, inside, D: tl.constexpr, PAD: tl.constexpr):
    """Copy the new token ``[D]`` of each sequence ``b`` to its slot of the buffer; ``slot`` is int64, as ``b``."""
    channel = tl.arange(0, PAD)
    mask = inside[:, None] & (channel < D)[None, :]
    row = tl.load(new + b[:, None] * new_b + channel[None, :], mask=mask, other=0.0)
    to = b[:, None] * buffer_b + slot[:, None] * buffer_n + channel[None, :]
    tl.store(buffer + to, row, mask=mask)


@triton.jit(do_not_specialize=["slot", "batch"])
def project_kernel(
    # The token.
    query,
    latents,
    rotary,
    weight,
    slot,
    # The buffer of full-precision tokens.
    latent_slots,
    rotary_slots,
    lengths,
    # Rotations.
    signs,
    rotary_signs,
    # Outputs.
    absorbed,
    rotated,
    turned,
    # Strides.
    query_b,
    query_h,
    latents_b,
    rotary_b,
    weight_h,
    weight_d,
    latent_slots_b,
    latent_slots_n,
    rotary_slots_b,
    rotary_slots_n,
    # Sizes.
    batch,
    # Constant sizes.
    HEADS: tl.constexpr,
    DN: tl.constexpr,
    R: tl.constexpr,
    LOG_R: tl.constexpr,
    DR: tl.constexpr,
    DR_PAD: tl.constexpr,
    LOG_DR: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_K: tl.constexpr,
    # Switches.
    COMPUTE: tl.constexpr,
    TURN: tl.constexpr,
    TURN_ROTARY: tl.constexpr,
    RAGGED: tl.constexpr,
):
    """Take a head's queries of ``BLOCK_B`` sequences into latent space; grid (heads, sequence blocks).

    The programs of the first head store the new tokens too, and count them in ``lengths``, which no other program of
    this launch reads.

    Args:
        query: ``[B, HEADS, DN + DR]``; the last dimension is contiguous, as in all that follows.
        latents: of the new tokens, ``[B, R]``.
        rotary: their rotary keys, ``[B, DR]``.
        weight: ``[HEADS, DN, R]``, the up-projection of the keys.
        slot: the slot of the new tokens; unless ``RAGGED``.
        latent_slots: ``[B, slots, R]``; the slot is written.
        rotary_slots: ``[B, slots, DR]``; the slot is written.
        lengths: int64 ``[B]``, slots in use of each sequence, which is the slot of its new token; read if ``RAGGED``,
            and counted on.
        signs: fp32 ``[R]``, of the rotation of latents; read if ``TURN`` is ``"signed_hadamard"``. ``rotary_signs``
            ``[DR]``: likewise for the rotary keys.
        absorbed: ``[B, HEADS, R + DR]``, written: the query in latent space, then its rotary part.
        rotated: fp32 ``[B, HEADS, R]``, written unless ``TURN`` is ``"none"``: in the rotated basis of the latents.
        turned: fp32 ``[B, HEADS, DR]``, written unless ``TURN_ROTARY`` is ``"none"``: in that of the rotary keys.
        query_b, query_h: elements between sequences and heads of the query; likewise of the others.
        batch: sequences.
        DR_PAD: ``DR`` rounded up to a power of two; the same unless ``TURN_ROTARY`` is ``"none"``.
        LOG_R, LOG_DR: logarithms in base 2 of ``R`` and ``DR_PAD``.
        BLOCK_K: channels of the query that are multiplied at a time.
        COMPUTE: type in which dot products take queries and weights.
        RAGGED: whether sequences hold different numbers of tokens.
    """
    head = tl.program_id(0)
    b = (tl.program_id(1) * BLOCK_B + tl.arange(0, BLOCK_B)).to(tl.int64)
    inside = b < batch
    channel = tl.arange(0, R)
    if head == 0:
        if RAGGED:
            to_slot = tl.load(lengths + b, mask=inside, other=0)
        else:
            to_slot = tl.zeros([BLOCK_B], tl.int64) + slot
        _store_token(latents, latents_b, latent_slots, latent_slots_b, latent_slots_n, to_slot, b, inside, R, R)
        if DR > 0:
            _store_token(rotary, rotary_b, rotary_slots, rotary_slots_b, rotary_slots_n, to_slot, b, inside, DR, DR_PAD)
        if RAGGED:
            tl.debug_barrier()  # several threads load the length of a sequence, and one of them stores it
            tl.store(lengths + b, to_slot + 1, mask=inside)
    rows = query + b[:, None] * query_b + head * query_h
    weights = weight + tl.cast(head, tl.int64) * weight_h
    acc = tl.zeros([BLOCK_B, R], tl.float32)
    for first in range(0, DN, BLOCK_K):
        d = first + tl.arange(0, BLOCK_K)
        x = tl.load(rows + d[None, :], mask=inside[:, None] & (d < DN)[None, :], other=0.0)
        w = tl.load(weights + d[:, None] * weight_d + channel[None, :], mask=(d < DN)[:, None], other=0.0)
        acc = tl.dot(x.to(COMPUTE), w.to(COMPUTE), acc, input_precision="ieee")
    to = b * HEADS + head
    there = inside[:, None] & (channel < R)[None, :]
    tl.store(absorbed + to[:, None] * (R + DR) + channel[None, :], acc.to(absorbed.dtype.element_ty), mask=there)
    if TURN != "none":
        x = _turn(acc, signs, BLOCK_B, R, LOG_R, TURN == "signed_hadamard")
        tl.store(rotated + to[:, None] * R + channel[None, :], x, mask=there)
    if DR > 0:
        place = tl.arange(0, DR_PAD)
        inside_rotary = inside[:, None] & (place < DR)[None, :]
        part = tl.load(rows + DN + place[None, :], mask=inside_rotary, other=0.0)
        tl.store(absorbed + to[:, None] * (R + DR) + R + place[None, :], part, mask=inside_rotary)
        if TURN_ROTARY != "none":
            x = _turn(part.to(tl.float32), rotary_signs, BLOCK_B, DR_PAD, LOG_DR, TURN_ROTARY == "signed_hadamard")
            tl.store(turned + to[:, None] * DR + place[None, :], x, mask=inside_rotary)


@triton.jit(
    do_not_specialize=["slots", "rows", "columns", "capacity", "per_split", "page_splits", "per_dense", "rows_m"]
)
def step_kernel(
    slots,
    # Queries.
    absorbed,
    rotated,
    turned,
    # Pages.
    pages,
    tables,
    # Full-precision tokens.
    latent_slots,
    rotary_slots,
    lengths,
    # Outputs.
    partial,
    partial_lse,
    # Strides.
    turned_b,
    turned_h,
    latent_slots_b,
    latent_slots_n,
    rotary_slots_b,
    rotary_slots_n,
    # Sizes and scoring.
    rows,
    columns,
    capacity,
    per_split,
    page_splits,
    per_dense,
    rows_m,
    inner,
    softcap,
    # Constant sizes.
    LATENTS: tl.constexpr,
    ROTARY: tl.constexpr,
    R: tl.constexpr,
    DR: tl.constexpr,
    DR_PAD: tl.constexpr,
    COMPUTE: tl.constexpr,
    PRECISION: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    PAGE_TOKENS: tl.constexpr,
    DENSE_TOKENS: tl.constexpr,
    STAGES: tl.constexpr,
    # Switches.
    ROTATED: tl.constexpr,
    FULL: tl.constexpr,
    SOFTCAP: tl.constexpr,
    RAGGED: tl.constexpr,
):
    """Attention of one query token over pages, the first ``page_splits`` splits, and slots, the other splits.

    The grid is (rows times query blocks, splits). Every query sees every token.

    Args:
        slots: slots in use, the new token's included; unless ``RAGGED``.
        lengths: int64 ``[rows]``, slots in use of each row, the new token's included; read if ``RAGGED``.
        absorbed: ``[rows, GROUP, R + DR]``, contiguous: the query in latent space, then its rotary part.
        rotated: ``[rows, GROUP, R]``: in the rotated basis of the latents if ``ROTATED``, and then contiguous; else
            ``absorbed``.
        turned: ``[rows, GROUP, DR]`` in the basis of the packed rotary keys.
        per_dense: slots of a split.
        rows_m: queries of a row, ``GROUP`` as well.
        LATENTS: the side of a page that holds the latents; None if there are no pages.
        PAGE_TOKENS: tokens of a page that are computed at a time.
        DENSE_TOKENS: slots that are computed at a time.
        RAGGED: whether rows hold different numbers of tokens.
        latent_slots, rotary_slots, DR_PAD and others: as in ``dense_kernel`` and ``pages_kernel``.
    """
    stride_h: tl.constexpr = R + DR
    rotated_h: tl.constexpr = R if ROTATED else R + DR
    if LATENTS is not None:  # noqa: SIM102 (known to the compiler, unlike the second condition)
        if tl.program_id(1) < page_splits:
            pages_kernel(
                rotated,
                turned,
                pages,
                pages,
                tables,
                absorbed,
                partial,
                partial_lse,
                GROUP * rotated_h,
                rotated_h,
                0,
                turned_b,
                turned_h,
                0,
                0,
                0,
                0,
                rows,
                columns,
                capacity,
                0,
                per_split,
                rows_m,
                0,
                0,
                0,
                inner,
                softcap,
                0.0,
                LATENTS,
                ROTARY,
                GROUP,
                BLOCK_M,
                PAGE_TOKENS,
                STAGES,
                FULL,
                0,
                False,
                False,
                "none",
                SOFTCAP,
            )
    if tl.program_id(1) >= page_splits:
        used = slots
        if RAGGED:
            used = tl.load(lengths + tl.program_id(0) // tl.cdiv(rows_m, BLOCK_M)).to(tl.int32)
        dense_kernel(
            absorbed,
            absorbed + R,
            latent_slots,
            rotary_slots,
            pages,
            pages,
            absorbed,
            partial,
            partial_lse,
            GROUP * stride_h,
            stride_h,
            0,
            GROUP * stride_h,
            stride_h,
            0,
            latent_slots_b,
            latent_slots_n,
            rotary_slots_b,
            rotary_slots_n,
            0,
            0,
            0,
            0,
            0,
            rows,
            used,
            per_dense,
            rows_m,
            0,
            0,
            0,
            page_splits,
            page_splits,
            0,
            inner,
            softcap,
            0.0,
            R,
            DR,
            DR_PAD,
            COMPUTE,
            PRECISION,
            GROUP,
            BLOCK_M,
            DENSE_TOKENS,
            STAGES,
            False,
            False,
            False,
            False,
            "none",
            SOFTCAP,
            False,
        )
