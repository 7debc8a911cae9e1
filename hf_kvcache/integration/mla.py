"""The binding to multi-head latent attention: where a model expands latents, a cache may attend to them as they are.

Attention classes of these families cache latents and call their method ``expand_kv`` on all of them at every step. Here
that method gets a wrapper which, for handles of a latent cache, returns handles again: the attention function then asks
the layer behind them, and the layer decides whether anything is expanded at all.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any, Protocol, cast
from weakref import WeakKeyDictionary, finalize, ref

import torch
from transformers import PreTrainedConfig

from hf_kvcache.integration.architecture import modeling_file
from hf_kvcache.integration.attention_call import AttentionCall
from hf_kvcache.integration.compiling import outside_graphs
from hf_kvcache.integration.handle import CachedStates, KVHandle, carrying_gradient
from hf_kvcache.kernels.inputs import UpProjections

#: The method that turns latents ``[B, 1, T, r]`` and rotary keys ``[B, 1, T, dr]`` into keys and values of every head.
METHOD = "expand_kv"
#: By the ids of bound configs: the file of their models, and what releases it, at the latest when the config dies.
_bound: dict[int, tuple[str, finalize[..., PreTrainedConfig]]] = {}

Expand = Callable[[Any, torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


def attention_classes(config: PreTrainedConfig) -> list[type]:
    """The classes that expand latents, in the file that models of this config are written in; found by inspection."""
    return _loaded_classes(modeling_file(config))


def own_ranks(config: PreTrainedConfig) -> set[int]:
    """Widths of the latents that layers of models with this config cache themselves; none if they do not."""
    layers = getattr(config, "per_layer_config", None) or [config]
    ranks = {rank for layer in layers if (rank := getattr(layer, "kv_lora_rank", None)) is not None}
    return ranks if ranks and attention_classes(config) else set()


def _loaded_classes(file: str) -> list[type]:
    """The same if that file was imported; none otherwise."""
    names = vars(sys.modules.get(file, object))
    return [cls for cls in names.values() if isinstance(cls, type) and METHOD in vars(cls)]


def bind(config: PreTrainedConfig) -> None:
    """Let models with this ``config`` attend to latents; for anything but handles of a latent cache nothing changes."""
    file, key = modeling_file(config), id(config)
    for cls in _loaded_classes(file):
        expand = vars(cls)[METHOD]
        if not hasattr(expand, "__wrapped__"):
            setattr(cls, METHOD, _wrapped(expand))
    if key not in _bound:
        release = finalize(config, _release, key)
        release.atexit = False
        _bound[key] = file, release


def unbind(config: PreTrainedConfig) -> None:
    """Undo :func:`bind`; classes get their own method back once no model of theirs is bound."""
    if id(config) in _bound:
        _bound[id(config)][1]()


def _release(key: int) -> None:
    file, _ = _bound.pop(key)
    if any(file == other for other, _ in list(_bound.values())):
        return
    for cls in _loaded_classes(file):
        expand = vars(cls)[METHOD]
        if hasattr(expand, "__wrapped__"):
            setattr(cls, METHOD, expand.__wrapped__)


def _wrapped(expand: Expand) -> Expand:
    @functools.wraps(expand)
    @outside_graphs
    def expand_or_not(module: Any, kv_nope: torch.Tensor, k_rot: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if isinstance(kv_nope, KVHandle) and isinstance(k_rot, KVHandle) and kv_nope.layer().takes_expansion:
            return Expansion(cast(CachedLatents, kv_nope.layer()), module, expand).handles(kv_nope.shape[2])
        return expand(module, kv_nope, k_rot)

    return expand_or_not


class CachedLatents(CachedStates, Protocol):
    """What an expansion asks of the layer that holds the latents; its keys are latents, its values rotary keys."""

    device: torch.device
    dtype: torch.dtype
    #: The expansion through which attention came last.
    expansion: Expansion | None

    @property
    def batch_size(self) -> int:
        """Sequences held."""


class Expansion:
    """Stands for all keys and values that one module would expand the latents of a layer to.

    It is to the handles what a layer is to others: the attention function and the dense fallback ask it.

    Args:
        layer: holds the latents.
        module: the attention module that reads them; of layers that share a cache each has its own.
        expand: the module's class's own ``expand_kv``.
    """

    #: Handles of expanded keys are not expanded again.
    takes_expansion = False

    def __init__(self, layer: CachedLatents, module: torch.nn.Module, expand: Expand) -> None:
        self.latents, self._module, self._expand = layer, ref(module), expand
        self._dense: tuple[int, tuple[torch.Tensor, torch.Tensor]] | None = None

    @property
    def module(self) -> torch.nn.Module:
        """The module that expands; held weakly, since the layer remembers who attended last."""
        module = self._module()
        if module is None:
            raise RuntimeError("the attention module that would expand these latents is gone, with its model")
        return module

    @property
    def version(self) -> int:
        """Changes whenever handles given out earlier become wrong."""
        return self.latents.version

    @property
    def evicts(self) -> bool:
        """Whether tokens that a query may see can be gone."""
        return self.latents.evicts

    def handles(self, length: int) -> tuple[KVHandle, KVHandle]:
        """Handles on the keys and values of ``length`` tokens."""
        batch, sides = self.latents.batch_size, zip(("keys", "values"), _expanded(self), strict=True)
        keys, values = (KVHandle(self, side, (batch, x.shape[1], length, x.shape[3]), x) for side, x in sides)
        sources = [x for x in self.differentiable() if x.requires_grad] if torch.is_grad_enabled() else []
        if not sources:
            return keys, values
        exact = not self.has_history()
        shown = self.new_tokens() if exact else (sources[0], sources[0])
        return carrying_gradient(keys, shown[0], exact), carrying_gradient(values, shown[1], exact)

    def expand(self, latents: torch.Tensor, rotary_keys: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values ``[B, H, T, D]`` of latents ``[B, 1, T, r]`` and rotary keys ``[B, 1, T, dr]``."""
        return self._expand(self.module, latents, rotary_keys)

    def has_history(self) -> bool:
        """Whether attention has to look at anything but the tokens of the latest update."""
        return self.latents.has_history()

    def new_tokens(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of the latest update, dense ``[B, H, T, D]``, with their gradient if they have one."""
        return self.expand(*self.latents.new_tokens())

    def differentiable(self) -> tuple[torch.Tensor, ...]:
        """What attention over the latest update may be asked for a gradient of, beside its queries."""
        return (*self.latents.differentiable(), *self.module.parameters())

    def note_attended(self, call: AttentionCall) -> None:
        """Take note that someone else computed the attention of the latest update."""
        self.latents.expansion = self
        self.latents.note_attended(call)

    def attend(self, call: AttentionCall) -> torch.Tensor:
        """Attention of the latest update's queries, which are in the space of the expanded keys."""
        self.latents.expansion = self
        return self.latents.attend(call)

    def note_dense_read(self) -> None:
        """Take note that someone reads dense keys and values."""
        self.latents.note_dense_read()

    def dense_side(self, side: str) -> torch.Tensor:
        """All keys or all values, expanded."""
        if self._dense is None or self._dense[0] != self.version:
            both = self.latents.dense_side("keys"), self.latents.dense_side("values")
            self._dense = self.version, self.expand(*both)
        return self._dense[1][0 if side == "keys" else 1]

    def up_projections(self) -> UpProjections | None:
        """The weight of the expansion, if it can be absorbed into queries and outputs; None: expand instead.

        It cannot where ``kv_b_proj`` is more than a matrix (LoRA, quantized or offloaded weights, hooks).
        """
        projection = getattr(self.module, "kv_b_proj", None)
        if type(projection) is not torch.nn.Linear or projection.bias is not None:
            return None
        if projection._forward_hooks or projection._forward_pre_hooks or "_hf_hook" in projection.__dict__:
            return None
        weight = projection.weight
        if weight.device != self.latents.device or weight.dtype != self.latents.dtype:
            return None
        known = _known_weights.get(self.module)
        if known is None or not known.is_of(weight):
            known = _known_weights[self.module] = _Weight(weight, _split_if_plain(self, weight))
        return known.up


class _Weight:
    """A weight's halves, as long as the weight lies where it lay; what it holds may change.

    Args:
        weight: of the projection.
        up: views of it; None if it is no plain matrix.
    """

    def __init__(self, weight: torch.Tensor, up: UpProjections | None) -> None:
        self._weight, self._place, self.up = ref(weight), (weight.data_ptr(), weight.dtype), up

    def is_of(self, weight: torch.Tensor) -> bool:
        """Whether this is still the weight."""
        return self._weight() is weight and self._place == (weight.data_ptr(), weight.dtype)


def _split_if_plain(expansion: Expansion, weight: torch.Tensor) -> UpProjections | None:
    plain = type(weight) is torch.nn.Parameter and weight.is_floating_point()
    return _split(expansion, weight) if plain and _is_plain_expansion(expansion, weight) else None


def _split(expansion: Expansion, weight: torch.Tensor) -> UpProjections:
    module: Any = expansion.module
    keys, values = module.qk_nope_head_dim, module.v_head_dim
    by_head = weight.detach().view(-1, keys + values, weight.shape[1])
    return UpProjections(by_head[:, :keys], by_head[:, keys:])


_known_weights: WeakKeyDictionary[torch.nn.Module, _Weight] = WeakKeyDictionary()
_known_shapes: WeakKeyDictionary[torch.nn.Module, tuple[torch.Tensor, torch.Tensor]] = WeakKeyDictionary()
_known_plain: WeakKeyDictionary[torch.nn.Module, bool] = WeakKeyDictionary()


def _expanded(expansion: Expansion) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values ``[1, H, 0, D]`` as the module makes them: for heads, widths and dtype."""
    latents, rotary = expansion.latents.new_tokens()
    known = _known_shapes.get(expansion.module)
    if known is None or known[0].dtype != latents.dtype or known[0].device != latents.device:
        with torch.no_grad():
            keys, values = expansion.expand(latents[:1, :, :1], rotary[:1, :, :1])
        known = _known_shapes[expansion.module] = keys[:, :, :0].clone(), values[:, :, :0].clone()
    return known


@torch.no_grad()
def _is_plain_expansion(expansion: Expansion, weight: torch.Tensor) -> bool:
    """Whether the module's ``expand_kv`` is what the absorbed form takes it to be, asked once with random latents."""
    module: Any = expansion.module
    if module not in _known_plain:
        latents, rotary = expansion.latents.new_tokens()
        generator = torch.Generator().manual_seed(0)
        c, k = (torch.randn(1, 1, 2, x.shape[3], generator=generator).to(x) for x in (latents, rotary))
        keys, values = expansion.expand(c, k)
        up = _split(expansion, weight)
        expected = torch.cat([c @ up.keys.transpose(1, 2), k.expand(-1, len(up.keys), -1, -1)], -1)
        tolerance = 8 * torch.finfo(weight.dtype).eps
        _known_plain[module] = all(
            a.shape == b.shape and float((a - b).norm()) <= tolerance * float(b.norm())
            for a, b in ((keys, expected), (values, c @ up.values.transpose(1, 2)))
        )
    return _known_plain[module]
