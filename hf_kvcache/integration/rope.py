"""The rotary embedding of an attention layer, learned by asking the layer itself.

How a head's dimensions pair up (halves, neighbours, only a part of the head), which of them rotate, and how fast,
differs from family to family. None of that is listed here: the layer is run once on a few random states with hand-made
cosines and sines, and its answers say which dimension each of them moved, and where to.
"""

from __future__ import annotations

import inspect
import sys
from dataclasses import dataclass
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch

from hf_kvcache.integration.versions import ask_with_cache

#: Rope types whose frequencies depend on how long the sequence is: a key does not say by which it was rotated.
_LENGTH_DEPENDENT = ("dynamic", "longrope")
#: Random states shown to a layer: the more there are, the less can two dimensions be mistaken for each other.
_STATES = 8
#: Two keys are the same if they differ by less than this share; bfloat16 rounds by 0.4 %.
_NEAR = 1e-2
#: Columns of cosines and sines are numbered with so many digits of this base, which bfloat16 tells apart.
_BASE, _DIGITS = 16, 3
#: Where it is checked that a pair's angle is position times frequency.
_FAR = 1000  # or the last position that the model has
_NO_ROTATION = "its keys are not a rotation of what they are at position 0"


class _Embedding(NamedTuple):
    """A family's own source of cosines and sines."""

    rotary: torch.nn.Module
    layer_type: str | None

    def __call__(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """``cos, sin``, float32 ``[1, n, C]``, at ``positions [1, n]``."""
        like = torch.empty(0, device=positions.device)
        arguments = () if self.layer_type is None else (self.layer_type,)
        tables = self.rotary.to(positions.device)(like, positions, *arguments)
        if not (isinstance(tables, tuple) and len(tables) == 2):
            raise TypeError(f"{type(self.rotary).__name__} gives a {type(tables).__name__}, not cosines and sines")
        return tables


@dataclass(frozen=True)
class LayerRope:
    """The rotary embedding of one layer; ``hf_kvcache.eviction.context.Rope`` says what its methods do.

    Every dimension belongs to a pair: those that the layer does not rotate stand in pairs of frequency 0, behind the
    others. A layer without positions (some of Cohere 2 and SmolLM 3) has only such pairs.

    Attributes:
        embedding: gives the cosines and sines.
        first: int64 ``[D / 2]``, the dimension that holds a pair's real part.
        second: int64 ``[D / 2]``, the dimension that holds its imaginary part.
        columns: int64 ``[2, P]``, the columns of the cosine and the sine that rotate each of the first ``P`` pairs.
        frequencies: float32 ``[D / 2]``, radians per position.
        scale: factor of the length that comes with rotating (yarn's attention scaling), 1 for most models.
    """

    embedding: _Embedding
    first: torch.Tensor
    second: torch.Tensor
    columns: torch.Tensor
    frequencies: torch.Tensor
    scale: float

    def rotate(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """``x [..., n, D]`` rotated and scaled as by the layer at ``positions`` (``[n]`` or ``[..., n]``), float32."""
        cos, sin = self._turn(x, positions)
        return self._turned(x, cos, sin)

    def unrotate(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """The inverse of :meth:`rotate`."""
        cos, sin = self._turn(x, positions)
        return self._turned(x, cos / self.scale**2, -sin / self.scale**2)

    def pairs(self, x: torch.Tensor) -> torch.Tensor:
        """``x [..., D]`` as complex64 ``[..., D / 2]``, in the order of :attr:`frequencies`."""
        return torch.complex(x[..., self.first.to(x.device)].float(), x[..., self.second.to(x.device)].float())

    def _turn(self, x: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosine and sine of each rotated pair ``[..., n, P]``, as the model itself computes them."""
        tables = self.embedding(positions.to(x.device).reshape(1, -1))
        cos, sin = (
            table[0, :, _places(column, x.device)].reshape(*positions.shape, -1)
            for table, column in zip(tables, self.columns, strict=True)
        )
        return cos, sin

    def _turned(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        moving = self.columns.shape[1]
        first, second = (_places(dims[:moving], x.device) for dims in (self.first, self.second))
        real, imaginary = x[..., first].float(), x[..., second].float()
        shape = torch.broadcast_shapes(x.shape[:-1], cos.shape[:-1])
        turned = x.float().expand(*shape, -1).clone()
        turned[..., first] = real * cos - imaginary * sin
        turned[..., second] = imaginary * cos + real * sin
        return turned


def _places(dims: torch.Tensor, device: torch.device) -> slice | torch.Tensor:
    """``dims`` as an index: a slice where they are evenly spaced, as in most families, because it copies nothing."""
    if len(dims) == 0:
        return slice(0)
    listed = dims.tolist()
    step = listed[1] - listed[0] if len(listed) > 1 else 1
    if step > 0 and listed == list(range(listed[0], listed[-1] + 1, step)):
        return slice(listed[0], listed[-1] + 1, step)
    return dims.to(device)


_known: WeakKeyDictionary[torch.nn.Module, LayerRope] = WeakKeyDictionary()


def rope_of(module: torch.nn.Module) -> LayerRope:
    """The rotary embedding of an attention module, built from its config and checked against the module.

    The frequencies are those of the config: a model whose rotary buffers were rounded afterwards (``model.bfloat16()``;
    loading with ``dtype=`` does not round them) rotates otherwise.

    Raises:
        ValueError: if the model has no rotary embedding, one whose frequencies depend on the length, one with several
            positions per token, or one that cannot be told from the module's keys.
    """
    if module not in _known:
        _known[module] = _learn(module)
    return _known[module]


def _learn(module: torch.nn.Module) -> LayerRope:
    config: Any = getattr(module, "config", None)
    rotary_class = _rotary_class(module)
    try:
        rotary = rotary_class(config)
        takes_type = "layer_type" in inspect.signature(rotary.forward).parameters
        embedding = _Embedding(rotary, _layer_type(module, config) if takes_type else None)
        _check_kind(module, config, embedding)
        width = embedding(torch.zeros(1, 1, dtype=torch.long))[0].shape[-1]
        keys, values = _answers(module, config, width)
    except _RefusedError:
        raise
    except Exception as error:
        raise _refuse(module, f"asking it failed with {type(error).__name__}: {error}") from error
    if float((values - values[:, :1]).norm()) > _NEAR * float(values.norm()):
        raise _refuse(module, "its values depend on positions too, as those of latent attention do")
    moves, still = _layout(module, keys)
    pairs = _pair_up(module, moves)
    far = min(_FAR, int(getattr(config, "max_position_embeddings", None) or _FAR + 1) - 1)
    frequencies, scale = _speeds(module, embedding, moves, pairs, far)
    if len(still) % 2:
        raise _refuse(module, f"{len(still)} of its dimensions do not rotate, which is odd")
    half = len(still) // 2
    return LayerRope(
        embedding,
        first=torch.tensor([pair[0] for pair in pairs] + still[:half]),
        second=torch.tensor([pair[1] for pair in pairs] + still[half:]),
        columns=torch.tensor([(moves[dim].own, moves[dim].other) for dim, _ in pairs]).long().view(-1, 2).T,
        frequencies=torch.cat([frequencies, torch.zeros(half)]),
        scale=scale,
    )


class _RefusedError(ValueError):
    """Told apart from what a model's own code raises."""


def _refuse(module: torch.nn.Module, why: str) -> _RefusedError:
    name = type(module).__name__
    return _RefusedError(
        f"the rotary embedding of {name} cannot be undone: {why}; choose a policy or projection that needs none"
    )


def _rotary_class(module: torch.nn.Module) -> Any:
    """The rotary embedding beside the module, in the file of its class or of the nearest base class that has one."""
    for cls in type(module).__mro__:
        names = vars(sys.modules[cls.__module__])
        found = [name for name in names if name.endswith("RotaryEmbedding") and isinstance(names[name], type)]
        own = f"{cls.__name__.removesuffix('Attention')}RotaryEmbedding"
        text = [name for name in found if not any(other in name for other in ("Vision", "Audio"))]
        if own in found:
            return names[own]
        if len(text) == 1:
            return names[text[0]]
        if text:
            raise _refuse(module, f"it may use any of {', '.join(text)}")
    raise _RefusedError(
        f"{type(module).__name__} has no rotary embedding; choose a policy or projection that needs none"
    )


def _layer_type(module: torch.nn.Module, config: Any) -> str:
    for name in ("layer_type", "attention_type"):
        if isinstance(getattr(module, name, None), str):
            return str(getattr(module, name))
    return str(config.layer_types[module.layer_idx])


def reason_against(config: Any) -> str | None:
    """Why rotary positions cannot be undone in any layer of a model with this config, as far as the config says."""
    parameters = getattr(config, "rope_parameters", None)
    if "mrope_section" in str(parameters):
        return "it gives a token several positions (mrope_section)"
    kind = parameters.get("rope_type") if isinstance(parameters, dict) else None
    if kind in _LENGTH_DEPENDENT:
        return f"rope_type={kind!r} changes its frequencies with the length"
    if getattr(config, "layer_rope_theta", None) is not None:
        return "each layer has frequencies of its own (layer_rope_theta)"
    if getattr(config, "alibi", False):
        return "its positions are biases of the scores (alibi)"
    if getattr(config, "position_embedding_type", None) not in (None, "rope", "rotary"):
        return f"position_embedding_type={config.position_embedding_type!r}"
    return None


def _check_kind(module: torch.nn.Module, config: Any, embedding: _Embedding) -> None:
    """Refuse what a layer's own answers would not show: what the model around it does with positions."""
    kind = getattr(embedding.rotary, "rope_type", None)
    kind = kind.get(embedding.layer_type) if isinstance(kind, dict) else kind
    if kind in _LENGTH_DEPENDENT:
        raise _refuse(module, f"rope_type={kind!r} changes its frequencies with the length")
    if embedding.layer_type is not None and kind is None:
        raise _refuse(module, f"its config has none for layers of type {embedding.layer_type!r}")
    if (why := reason_against(config)) is not None:
        raise _refuse(module, why)


class _Answered(Exception):
    """Carries the keys and values of a layer out of its forward pass."""


class _Listener:
    """Stands where the layer expects a cache."""

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> None:
        raise _Answered(key_states, value_states)


@torch.no_grad()
def _answers(module: torch.nn.Module, config: Any, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values ``[signatures, 3 + 2 * digits, D]`` of random states under hand-made cosines and sines.

    Row 0 has cosine 1 and sine 0 everywhere: keys before rotating. Row 1 has zeros: what does not rotate stays. Row 2
    has sine 1: each dimension's partner. Then a column's cosine is one digit of its number, and at last its sine. A
    signature is a head and a state.
    """
    takes = inspect.signature(module.forward).parameters
    if "position_embeddings" not in takes:
        raise TypeError("its forward takes no position_embeddings")
    weight = next(p for p in module.parameters() if p.is_floating_point())
    digits = torch.arange(width) // _BASE ** torch.arange(_DIGITS)[:, None] % _BASE + 1
    one, zero, zeros = torch.ones(1, width), torch.zeros(1, width), torch.zeros(_DIGITS, width)
    cos = torch.cat([one, zero, zero, digits, zeros]).to(weight)
    sin = torch.cat([zero, zero, one, zeros, digits]).to(weight)
    states = torch.randn(_STATES, 1, config.hidden_size, generator=torch.Generator().manual_seed(0)).to(weight)
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


def _layout(module: torch.nn.Module, keys: torch.Tensor) -> tuple[dict[int, _Move], list[int]]:
    """How each dimension that rotates is rotated, and the dimensions that do not.

    Args:
        module: named in errors.
        keys: as :func:`_answers` gives them.
    """
    plain, nothing, brought = keys[:, 0], keys[:, 1], keys[:, 2]
    near = _NEAR * plain.norm(dim=0)
    stays, goes = (nothing - plain).norm(dim=0) <= near, nothing.norm(dim=0) <= near
    moving = goes.nonzero().flatten()
    candidates = torch.cat([plain, -plain], dim=1)
    distances = torch.cdist(brought[:, moving].T, candidates.T, compute_mode="donot_use_mm_for_euclid_dist")
    found = distances <= _NEAR * brought[:, moving].norm(dim=0)[:, None]
    if (stays == goes).any() or (found.sum(1) != 1).any():
        raise _refuse(module, _NO_ROTATION)
    by_cos, by_sin = keys[:, 3:, moving].chunk(2, dim=1)
    own, other = _number(module, by_cos, plain[:, moving]), _number(module, by_sin, brought[:, moving])
    moves = {}
    for at, dim in enumerate(moving.tolist()):
        minus, partner = divmod(int(found[at].nonzero()), plain.shape[1])
        moves[dim] = _Move(partner, -1 if minus else 1, own[at], other[at])
    return moves, stays.nonzero().flatten().tolist()


def _number(module: torch.nn.Module, answers: torch.Tensor, unit: torch.Tensor) -> list[int]:
    """The columns whose digits have multiplied ``unit [signatures, n]`` into ``answers [signatures, digits, n]``."""
    digits = ((answers * unit[:, None]).sum(0) / unit.square().sum(0)).round()
    if ((answers - digits * unit[:, None]).norm(dim=0) > _NEAR * answers.norm(dim=0)).any():
        raise _refuse(module, _NO_ROTATION)
    return ((digits.long() - 1) * _BASE ** torch.arange(_DIGITS)[:, None]).sum(0).tolist()


def _pair_up(module: torch.nn.Module, moves: dict[int, _Move]) -> list[tuple[int, int]]:
    """The real and the imaginary dimension of each pair."""
    pairs = [(dim, move.partner) for dim, move in moves.items() if move.sign < 0]
    for real, imaginary in pairs:
        back = moves.get(imaginary)
        if back is None or (back.partner, back.sign) != (real, 1):
            raise _refuse(module, _NO_ROTATION)
    if 2 * len(pairs) != len(moves):
        raise _refuse(module, _NO_ROTATION)
    return pairs


def _speeds(
    module: torch.nn.Module, embedding: _Embedding, moves: dict[int, _Move], pairs: list[tuple[int, int]], far: int
) -> tuple[torch.Tensor, float]:
    """Radians per position of each pair ``[P]``, and the factor of the length.

    One position apart the angle is the frequency; that the model keeps to it is checked at position ``far``.
    """
    at = torch.tensor([[0, 1, far]])
    cos, sin = (table[0].double() for table in embedding(at))
    first, second = ([moves[dim] for dim in dims] for dims in ([p[0] for p in pairs], [p[1] for p in pairs]))
    turns = [torch.complex(cos[:, [m.own for m in side]], sin[:, [m.other for m in side]]) for side in (first, second)]
    scale = float(turns[0][0].abs().mean()) if pairs else 1.0
    frequencies = turns[0][1].angle()
    expected = scale * torch.exp(1j * torch.tensor([[0.0], [1.0], [far]]) * frequencies)
    # Angles are float32 products: they are off by some units in the last place of up to `far` radians.
    if any(float((turn - expected).abs().max()) > 1e-3 * scale for turn in turns if pairs):
        raise _refuse(module, _NO_ROTATION)
    return frequencies.float(), scale
