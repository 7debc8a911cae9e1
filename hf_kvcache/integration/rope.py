"""The rotary embedding of an attention layer, found out by running the layer itself.

Families differ in how a head's dimensions form pairs (halves, neighbours, only a part of the head), which of them
rotate, and how fast. No family is listed here: ``rope_probe.py`` finds out what a layer does.
"""

from __future__ import annotations

import inspect
import sys
from dataclasses import dataclass
from functools import cached_property
from typing import Any
from weakref import WeakKeyDictionary

import torch

from hf_kvcache.integration.rope_probe import Embedding, RopeError, probe, rope_error

#: Rope types whose frequencies depend on the length of the sequence: a key does not say by which it was rotated.
_LENGTH_DEPENDENT = ("dynamic", "longrope")


@dataclass(frozen=True)
class LayerRope:
    """The rotary embedding of one layer; ``hf_kvcache.eviction.context.Rope`` says what its methods do.

    Every dimension belongs to a pair. Dimensions that the layer does not rotate form pairs of frequency 0, after the
    others. A layer without positions (some of Cohere 2 and SmolLM 3) has only such pairs.

    Attributes:
        embedding: computes the cosines and sines.
        first: int64 ``[D / 2]``, the dimension that holds a pair's real part.
        second: int64 ``[D / 2]``, the dimension that holds its imaginary part.
        columns: int64 ``[2, P]``, the columns of the cosine and the sine that rotate each of the first ``P`` pairs.
        frequencies: float32 ``[D / 2]``, radians per position.
        scale: factor of the length that comes with rotating (yarn's attention scaling), 1 for most models.
    """

    embedding: Embedding
    first: torch.Tensor
    second: torch.Tensor
    columns: torch.Tensor
    frequencies: torch.Tensor
    scale: float

    def rotate(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """``x [..., n, D]`` rotated and scaled as by the layer at ``positions`` (``[n]`` or ``[..., n]``), float32."""
        cos, sin = self._tables(x, positions)
        return self._rotated(x, cos, sin)

    def unrotate(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """The inverse of :meth:`rotate`."""
        cos, sin = self._tables(x, positions)
        return self._rotated(x, cos / self.scale**2, -sin / self.scale**2)

    def pairs(self, x: torch.Tensor) -> torch.Tensor:
        """``x [..., D]`` as complex64 ``[..., D / 2]``, in the order of :attr:`frequencies`."""
        real, imaginary = (x[..., self._index(name, x.device)].float() for name in ("first", "second"))
        return torch.complex(real, imaginary)

    def _tables(self, x: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosine and sine of each rotated pair ``[..., n, P]``, as the model itself computes them."""
        tables = self.embedding(positions.to(x.device).reshape(1, -1))
        cos, sin = (
            table[0, :, self._index(name, x.device)].reshape(*positions.shape, -1)
            for table, name in zip(tables, ("cosines", "sines"), strict=True)
        )
        return cos, sin

    def _rotated(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        first, second = (self._index(name, x.device) for name in ("moving first", "moving second"))
        real, imaginary = x[..., first].float(), x[..., second].float()
        shape = torch.broadcast_shapes(x.shape[:-1], cos.shape[:-1])
        rotated = x.float().expand(*shape, -1).clone()
        rotated[..., first] = real * cos - imaginary * sin
        rotated[..., second] = imaginary * cos + real * sin
        return rotated

    def _index(self, name: str, device: torch.device) -> slice | torch.Tensor:
        """Which dimensions, or columns of tables, ``name`` stands for; asked for once a device."""
        key = name, device
        if key not in self._indices:
            moving = self.columns.shape[1]
            dims = {
                "first": self.first,
                "second": self.second,
                "moving first": self.first[:moving],
                "moving second": self.second[:moving],
                "cosines": self.columns[0],
                "sines": self.columns[1],
            }
            self._indices[key] = _index(dims[name], device)
        return self._indices[key]

    @cached_property
    def _indices(self) -> dict[tuple[str, torch.device], slice | torch.Tensor]:
        return {}


def _index(dims: torch.Tensor, device: torch.device) -> slice | torch.Tensor:
    """``dims`` as an index: a slice where they are evenly spaced, as in most families, since a slice copies nothing."""
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

    The frequencies are those of the config. A model whose rotary buffers were rounded afterwards by
    ``model.bfloat16()`` rotates by other frequencies; loading with ``dtype=`` does not round them.

    Raises:
        ValueError: if the model has no rotary embedding, one whose frequencies depend on the length, one with several
            positions per token, or one that cannot be found out from the module's keys.
    """
    if module not in _known:
        _known[module] = _learn(module)
    return _known[module]


def _learn(module: torch.nn.Module) -> LayerRope:
    config: Any = getattr(module, "config", None)
    rotary_class = _rotary_class(module)
    try:
        with torch.device("cpu"):  # whatever default device is set
            rotary = rotary_class(config)
            takes_type = "layer_type" in inspect.signature(rotary.forward).parameters
            embedding = Embedding(rotary, _layer_type(module, config) if takes_type else None)
            _check_kind(module, config, embedding)
            return LayerRope(embedding, *probe(module, config, embedding))
    except RopeError:
        raise
    except Exception as error:
        raise rope_error(module, f"asking it failed with {type(error).__name__}: {error}") from error


def _rotary_class(module: torch.nn.Module) -> Any:
    """The class of rotary embeddings in the file of the module's class, or of the nearest base class that has one."""
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
            raise rope_error(module, f"it may use any of {', '.join(text)}")
    raise RopeError(f"{type(module).__name__} has no rotary embedding; choose a policy or projection that needs none")


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


def _check_kind(module: torch.nn.Module, config: Any, embedding: Embedding) -> None:
    """Refuse positions that the model computes outside of the layer, so that the layer's own keys do not show them."""
    kind = getattr(embedding.rotary, "rope_type", None)
    kind = kind.get(embedding.layer_type) if isinstance(kind, dict) else kind
    if kind in _LENGTH_DEPENDENT:
        raise rope_error(module, f"rope_type={kind!r} changes its frequencies with the length")
    if embedding.layer_type is not None and kind is None:
        raise rope_error(module, f"its config has none for layers of type {embedding.layer_type!r}")
    if (why := reason_against(config)) is not None:
        raise rope_error(module, why)
