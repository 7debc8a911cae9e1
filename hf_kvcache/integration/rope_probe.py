"""Finding out how an attention module rotates its keys, by running it once.

The module gets a few random states with hand-made cosines and sines. Its keys then say which dimensions rotate, which
of them form pairs, and which columns of cosines and sines each of them reads.
"""

from __future__ import annotations

import inspect
from copy import deepcopy
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch

from hf_kvcache.integration.placement import runs_on
from hf_kvcache.integration.versions import ask_with_cache

#: Number of random states that a module is shown. With more states, fewer dimensions are mistaken for each other.
_STATES = 8
#: Two keys are the same if they differ by less than this share; bfloat16 rounds by 0.4 %.
_NEAR = 1e-2
#: Columns of cosines and sines are numbered with this many digits of this base, which bfloat16 tells apart.
_BASE, _DIGITS = 16, 3
#: Position at which the angle of a pair is compared with position times frequency, or the model's last position.
_FAR = 1000
_NO_ROTATION = "its keys are not a rotation of what they are at position 0"


class Embedding(NamedTuple):
    """The cosines and sines of a model family's own rotary embedding.

    Attributes:
        rotary: the module that computes them.
        layer_type: its argument that tells types of layers apart; None where it has no such argument.
    """

    rotary: torch.nn.Module
    layer_type: str | None

    def __call__(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """``cos, sin``, float32 ``[1, n, C]``, at ``positions [1, n]``."""
        like = torch.empty(0, dtype=torch.float32, device=positions.device)
        arguments = () if self.layer_type is None else (self.layer_type,)
        tables = _on_device(self.rotary, positions.device)(like, positions, *arguments)
        if not (isinstance(tables, tuple) and len(tables) == 2):
            raise TypeError(f"{type(self.rotary).__name__} gives a {type(tables).__name__}, not cosines and sines")
        return tables


#: Copies of rotary embeddings on other devices than the CPU. Moving one to and fro would wait for the device each time.
_copies: WeakKeyDictionary[torch.nn.Module, dict[torch.device, torch.nn.Module]] = WeakKeyDictionary()


def _on_device(rotary: torch.nn.Module, device: torch.device) -> torch.nn.Module:
    """``rotary``, which is on the CPU, or its copy on another ``device``."""
    if device.type == "cpu":
        return rotary
    copies = _copies.setdefault(rotary, {})
    if device not in copies:
        copies[device] = deepcopy(rotary).to(device)
    return copies[device]


class RopeError(ValueError):
    """The rotary embedding cannot be undone. A class of its own, since a model's own code may raise ValueError too."""


def rope_error(module: torch.nn.Module, why: str) -> RopeError:
    """The error for a ``module`` whose rotary embedding cannot be undone, with the reason."""
    name = type(module).__name__
    return RopeError(
        f"the rotary embedding of {name} cannot be undone: {why}; choose a policy or projection that needs none"
    )


class RopeLayout(NamedTuple):
    """How a module rotates its keys; the fields are those of :class:`~hf_kvcache.integration.rope.LayerRope`."""

    first: torch.Tensor
    second: torch.Tensor
    columns: torch.Tensor
    frequencies: torch.Tensor
    scale: float


def probe(module: torch.nn.Module, config: Any, embedding: Embedding) -> RopeLayout:
    """The layout of a module's rotary embedding, from its own keys.

    Raises:
        RopeError: if the keys are not rotated pair by pair, by angles of position times frequency.
        Exception: what the module itself raises when it is run.
    """
    width = embedding(torch.zeros(1, 1, dtype=torch.long, device="cpu"))[0].shape[-1]
    keys, values = _answers(module, config, width)
    if float((values - values[:, :1]).norm()) > _NEAR * float(values.norm()):
        raise rope_error(module, "its values depend on positions too, as those of latent attention do")
    moves, still = _moves(module, keys)
    pairs = _pair_up(module, moves)
    far = min(_FAR, int(getattr(config, "max_position_embeddings", None) or _FAR + 1) - 1)
    frequencies, scale = _speeds(module, embedding, moves, pairs, far)
    if len(still) % 2:
        raise rope_error(module, f"{len(still)} of its dimensions do not rotate, which is odd")
    half = len(still) // 2
    return RopeLayout(
        first=torch.tensor([pair[0] for pair in pairs] + still[:half], device="cpu"),
        second=torch.tensor([pair[1] for pair in pairs] + still[half:], device="cpu"),
        columns=torch.tensor([(moves[dim].own, moves[dim].other) for dim, _ in pairs], dtype=torch.int64, device="cpu")
        .view(-1, 2)
        .T,
        frequencies=torch.cat([frequencies, torch.zeros(half, dtype=torch.float32, device="cpu")]),
        scale=scale,
    )


class _Answered(Exception):
    """Raised to carry the keys and values of a layer out of its forward pass."""


class _Listener:
    """Takes the place of the cache that the layer expects."""

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> None:
        raise _Answered(key_states, value_states)


@torch.no_grad()
def _answers(module: torch.nn.Module, config: Any, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values ``[signatures, 3 + 2 * digits, D]`` of random states under hand-made cosines and sines.

    A signature is a head and a state. In row 0 all cosines are 1 and all sines 0: its keys are those before rotating.
    In row 1 all are 0: dimensions that do not rotate stay as they are, and others are 0. In row 2 the sines are 1: each
    dimension holds its partner. In the next rows the cosine of each column is one digit of the column's number, and in
    the last rows its sine is.
    """
    device = runs_on(module)
    takes = inspect.signature(module.forward).parameters
    if "position_embeddings" not in takes:
        raise TypeError("its forward takes no position_embeddings")
    weight = torch.empty(0, dtype=next(p.dtype for p in module.parameters() if p.is_floating_point()), device=device)
    digits = torch.arange(width, device="cpu") // _BASE ** torch.arange(_DIGITS, device="cpu")[:, None] % _BASE + 1
    one, zero, zeros = (
        torch.ones(1, width, dtype=torch.float32, device="cpu"),
        torch.zeros(1, width, dtype=torch.float32, device="cpu"),
        torch.zeros(_DIGITS, width, dtype=torch.float32, device="cpu"),
    )
    cos = torch.cat([one, zero, zero, digits, zeros]).to(weight)
    sin = torch.cat([zero, zero, one, zeros, digits]).to(weight)
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(_STATES, 1, config.hidden_size, generator=generator, dtype=torch.float32, device="cpu")
    states = states.to(weight)
    given: dict[str, Any] = {
        "hidden_states": states.expand(-1, len(cos), -1),
        "position_embeddings": (cos.expand(_STATES, -1, -1), sin.expand(_STATES, -1, -1)),
        "position_ids": torch.zeros(_STATES, len(cos), dtype=torch.long, device=weight.device),
        "attention_mask": None,
        "alibi": None,
        "shared_kv_states": {},
    }
    try:
        ask_with_cache(module, given, _Listener(), _Answered)
    except _Answered as answer:
        keys, values = (states.flatten(0, 1).float().cpu() for states in answer.args)
        return keys, values
    raise AssertionError("unreachable: without an answer there is an error")


class _Move(NamedTuple):
    """``key[dim] = plain[dim] * cos[own] + sign * plain[partner] * sin[other]``."""

    partner: int
    sign: int
    own: int
    other: int


def _moves(module: torch.nn.Module, keys: torch.Tensor) -> tuple[dict[int, _Move], list[int]]:
    """How each rotating dimension is rotated, and the dimensions that do not rotate.

    Args:
        module: named in errors.
        keys: as :func:`_answers` returns them.
    """
    plain, nothing, brought = keys[:, 0], keys[:, 1], keys[:, 2]
    near = _NEAR * plain.norm(dim=0)
    stays, goes = (nothing - plain).norm(dim=0) <= near, nothing.norm(dim=0) <= near
    moving = goes.nonzero().flatten()
    candidates = torch.cat([plain, -plain], dim=1)
    distances = torch.cdist(brought[:, moving].T, candidates.T, compute_mode="donot_use_mm_for_euclid_dist")
    found = distances <= _NEAR * brought[:, moving].norm(dim=0)[:, None]
    if (stays == goes).any() or (found.sum(1) != 1).any():
        raise rope_error(module, _NO_ROTATION)
    by_cos, by_sin = keys[:, 3:, moving].chunk(2, dim=1)
    own, other = _number(module, by_cos, plain[:, moving]), _number(module, by_sin, brought[:, moving])
    moves = {}
    for at, dim in enumerate(moving.tolist()):
        minus, partner = divmod(int(found[at].nonzero()), plain.shape[1])
        moves[dim] = _Move(partner, -1 if minus else 1, own[at], other[at])
    return moves, stays.nonzero().flatten().tolist()


def _number(module: torch.nn.Module, answers: torch.Tensor, unit: torch.Tensor) -> list[int]:
    """The columns by whose digits ``unit [signatures, n]`` was multiplied in ``answers [signatures, digits, n]``."""
    digits = ((answers * unit[:, None]).sum(0) / unit.square().sum(0)).round()
    if ((answers - digits * unit[:, None]).norm(dim=0) > _NEAR * answers.norm(dim=0)).any():
        raise rope_error(module, _NO_ROTATION)
    return ((digits.long() - 1) * _BASE ** torch.arange(_DIGITS, device="cpu")[:, None]).sum(0).tolist()


def _pair_up(module: torch.nn.Module, moves: dict[int, _Move]) -> list[tuple[int, int]]:
    """The real and the imaginary dimension of each pair."""
    pairs = [(dim, move.partner) for dim, move in moves.items() if move.sign < 0]
    for real, imaginary in pairs:
        back = moves.get(imaginary)
        if back is None or (back.partner, back.sign) != (real, 1):
            raise rope_error(module, _NO_ROTATION)
    if 2 * len(pairs) != len(moves):
        raise rope_error(module, _NO_ROTATION)
    return pairs


def _speeds(
    module: torch.nn.Module, embedding: Embedding, moves: dict[int, _Move], pairs: list[tuple[int, int]], far: int
) -> tuple[torch.Tensor, float]:
    """Radians per position of each pair ``[P]``, and the factor of the length.

    The angle at position 1 is the frequency. The angle at position ``far`` is compared with it.
    """
    at = torch.tensor([[0, 1, far]], device="cpu")
    cos, sin = (table[0].double() for table in embedding(at))
    first, second = ([moves[dim] for dim in dims] for dims in ([p[0] for p in pairs], [p[1] for p in pairs]))
    turns = [torch.complex(cos[:, [m.own for m in side]], sin[:, [m.other for m in side]]) for side in (first, second)]
    scale = float(turns[0][0].abs().mean()) if pairs else 1.0
    frequencies = turns[0][1].angle()
    expected = scale * torch.exp(
        1j * torch.tensor([[0.0], [1.0], [far]], dtype=torch.float32, device="cpu") * frequencies
    )
    # Angles are float32 products: of up to `far` radians, some units in the last place are wrong.
    if any(float((turn - expected).abs().max()) > 1e-3 * scale for turn in turns if pairs):
        raise rope_error(module, _NO_ROTATION)
    return frequencies.float(), scale
