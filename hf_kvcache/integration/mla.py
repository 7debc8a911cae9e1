"""The binding to multi-head latent attention (DeepSeek-V2, arXiv:2405.04434).

The attention classes of these model families cache latents. At every step they call their method ``expand_kv`` on all
cached latents to get keys and values. The binding wraps that method: for handles on latents it returns handles on keys
and values, and expands nothing. The attention function then calls the layer, which attends in latent space or expands
the latents itself.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any, Protocol, cast
from weakref import WeakKeyDictionary, finalize, ref

import torch
from transformers import PreTrainedConfig
from transformers.utils import logging

from hf_kvcache.integration import drafts, picks
from hf_kvcache.integration.architecture import modeling_file
from hf_kvcache.integration.attention_call import AttentionCall
from hf_kvcache.integration.compiling import outside_graphs
from hf_kvcache.integration.handle import CachedStates, KVHandle, attach_gradient
from hf_kvcache.integration.layer_configs import layer_configs
from hf_kvcache.integration.placement import keeps_weights
from hf_kvcache.kernels.inputs import UpProjections

logger = logging.get_logger(__name__)

#: The method that turns latents ``[B, 1, T, r]`` and rotary keys ``[B, 1, T, dr]`` into keys and values of every head.
METHOD = "expand_kv"
#: By the id of a bound config: the modeling file, and the finalizer that undoes the binding when the config is deleted.
_bound: dict[int, tuple[str, finalize[..., PreTrainedConfig]]] = {}

Expand = Callable[[Any, torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


def attention_classes(config: PreTrainedConfig) -> list[type]:
    """The attention classes of the config's modeling file that expand latents, found by inspection."""
    return _loaded_classes(modeling_file(config))


def own_ranks(config: PreTrainedConfig) -> set[int]:
    """The widths of the latents that a model with this config caches; empty if it caches keys and values."""
    ranks = {rank for layer in layer_configs(config) if (rank := getattr(layer, "kv_lora_rank", None)) is not None}
    return ranks if ranks and attention_classes(config) else set()


def _loaded_classes(file: str) -> list[type]:
    """The classes of an imported module that expand latents; empty if the module was not imported."""
    names = vars(sys.modules.get(file, object))
    return [cls for cls in names.values() if isinstance(cls, type) and METHOD in vars(cls)]


def bind(config: PreTrainedConfig) -> None:
    """Let models with this ``config`` attend to latents. Other caches work as before."""
    file, key = modeling_file(config), id(config)
    for cls in _loaded_classes(file):
        expand = vars(cls)[METHOD]
        if not hasattr(expand, "__wrapped__"):
            setattr(cls, METHOD, _wrapped(expand))
    picks.wrap(file, _takes_picks)
    drafts.wrap(file)
    if key not in _bound:
        release = finalize(config, _release, key)
        release.atexit = False
        _bound[key] = file, release


def unbind(config: PreTrainedConfig) -> None:
    """Undo :func:`bind`. Attention classes get their own method back when no config of their models is bound."""
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
    picks.unwrap(file)
    drafts.unwrap(file)


def _wrapped(expand: Expand) -> Expand:
    @functools.wraps(expand)
    @outside_graphs
    def expand_or_not(module: Any, kv_nope: torch.Tensor, k_rot: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if isinstance(kv_nope, KVHandle) and isinstance(k_rot, KVHandle) and kv_nope.layer().takes_expansion:
            return Expansion(cast(CachedLatents, kv_nope.layer()), module, expand).handles(kv_nope.shape[2])
        return expand(module, kv_nope, k_rot)

    return expand_or_not


def _takes_picks(cache: Any, layer: int, queries: int) -> bool:
    """Whether a cache can read the tokens that the indexer of a layer picks for so many queries one by one."""
    layers = getattr(cache, "layers", ())
    return layer < len(layers) and queries <= picks.MOST_QUERIES and getattr(layers[layer], "reads_picked", False)


class CachedLatents(CachedStates, Protocol):
    """The layer behind an expansion. Its keys are latents, and its values are rotary keys."""

    device: torch.device
    dtype: torch.dtype
    #: The expansion through which attention was last computed.
    expansion: Expansion | None

    @property
    def batch_size(self) -> int:
        """Number of sequences."""


class Expansion:
    """The keys and values that one attention module would expand the latents of a layer to.

    An expansion stands behind handles as a layer does (:class:`~hf_kvcache.integration.handle.CachedStates`). It passes
    attention on to the layer of latents, and expands latents only if a dense tensor is needed.

    Args:
        layer: the layer of latents.
        module: the attention module. Model layers that share one cache layer have a module each.
        expand: the method ``expand_kv`` of the module's class, without the wrapper.
    """

    #: Handles of expanded keys are not expanded again.
    takes_expansion = False

    def __init__(self, layer: CachedLatents, module: torch.nn.Module, expand: Expand) -> None:
        self.latents, self._module, self._expand = layer, ref(module), expand
        self._dense: tuple[int, tuple[torch.Tensor, torch.Tensor]] | None = None

    @property
    def module(self) -> torch.nn.Module:
        """The attention module. The reference is weak, because a cache must not keep a model alive."""
        module = self._module()
        if module is None:
            raise RuntimeError(
                "the model that filled this cache was deleted, and with it the attention module that expands its "
                "latents; run a forward pass of a loaded model with this cache first"
            )
        return module

    @property
    def version(self) -> int:
        """A number that is incremented whenever earlier handles become invalid."""
        return self.latents.version

    @property
    def evicts(self) -> bool:
        """Whether the layer drops tokens that a query may see."""
        return self.latents.evicts

    def handles(self, length: int) -> tuple[KVHandle, KVHandle]:
        """Handles on the keys and values of ``length`` tokens."""
        batch, sides = self.latents.batch_size, zip(("keys", "values"), _empty_expansion(self), strict=True)
        keys, values = (KVHandle(self, side, (batch, x.shape[1], length, x.shape[3]), x) for side, x in sides)
        sources = [x for x in self.differentiable() if x.requires_grad] if torch.is_grad_enabled() else []
        if not sources:
            return keys, values
        exact = not self.has_history()
        source = self.new_tokens() if exact else (sources[0], sources[0])
        return attach_gradient(keys, source[0], exact), attach_gradient(values, source[1], exact)

    def expand(self, latents: torch.Tensor, rotary_keys: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Expand latents ``[B, 1, T, r]`` and rotary keys ``[B, 1, T, dr]`` to keys and values ``[B, H, T, D]``."""
        return self._expand(self.module, latents, rotary_keys)

    def has_history(self) -> bool:
        """Whether attention must read tokens that were added before the latest update."""
        return self.latents.has_history()

    def new_tokens(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of the latest update, expanded, ``[B, H, T, D]``, with their gradient if there is one."""
        return self.expand(*self.latents.new_tokens())

    def differentiable(self) -> tuple[torch.Tensor, ...]:
        """The tensors, beside the queries, that the attention over the latest update has a gradient for."""
        return (*self.latents.differentiable(), *self.module.parameters())

    def note_attended(self, call: AttentionCall) -> None:
        """Record that another function computed the attention of the latest update."""
        self.latents.expansion = self
        self.latents.note_attended(call)

    def attend(self, call: AttentionCall) -> torch.Tensor:
        """Attention ``[B, T, H, dv]`` of the latest update's queries ``[B, H, T, dn + dr]`` over all tokens."""
        self.latents.expansion = self
        return self.latents.attend(call)

    def note_dense_read(self) -> None:
        """Record that the keys and values are read as dense tensors."""
        self.latents.note_dense_read()

    def dense_side(self, side: str) -> torch.Tensor:
        """All ``"keys"`` or all ``"values"``, expanded, ``[B, H, T, D]``."""
        if self._dense is None or self._dense[0] != self.version:
            both = self.latents.dense_side("keys"), self.latents.dense_side("values")
            self._dense = self.version, self.expand(*both)
        return self._dense[1][0 if side == "keys" else 1]

    def up_projections(self) -> UpProjections | None:
        """The two halves of the weight that expands latents, for attention in latent space.

        Returns:
            None if ``kv_b_proj`` is not a plain matrix (LoRA, quantized or offloaded weights, hooks of torch). Then the
            latents must be expanded.
        """
        projection = getattr(self.module, "kv_b_proj", None)
        if type(projection) is not torch.nn.Linear or projection.bias is not None:
            return None
        if projection._forward_hooks or projection._forward_pre_hooks:
            return None
        if not keeps_weights(projection):
            logger.warning_once(
                f"kv_b_proj of {type(self.module).__name__} has a hook that moves its weight (offloading): every step "
                "expands all latents, which is correct but slow. A device map that keeps the weight on the device of "
                "the layer avoids it"
            )
            return None
        weight = projection.weight
        if weight.device != self.latents.device or weight.dtype != self.latents.dtype:
            return None
        known = _known_weights.get(self.module)
        if known is None or not known.is_of(weight):
            known = _known_weights[self.module] = _Weight(weight, _split_if_plain(self, weight))
        return known.up


class _Weight:
    """The two halves of an up-projection's weight. They stay valid while the weight keeps its memory.

    The halves are views, so a change of the weight in place changes them too.

    Args:
        weight: the weight of the projection.
        up: the two halves as views of the weight; None if it is not a plain matrix.
    """

    def __init__(self, weight: torch.Tensor, up: UpProjections | None) -> None:
        self._weight, self._place, self.up = ref(weight), (weight.data_ptr(), weight.dtype), up

    def is_of(self, weight: torch.Tensor) -> bool:
        """Whether ``weight`` is the same tensor in the same memory."""
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


def _empty_expansion(expansion: Expansion) -> tuple[torch.Tensor, torch.Tensor]:
    """Empty keys and values ``[1, H, 0, D]`` with the heads, widths and dtype of those that the module makes."""
    latents, rotary = expansion.latents.new_tokens()
    known = _known_shapes.get(expansion.module)
    if known is None or known[0].dtype != latents.dtype or known[0].device != latents.device:
        with torch.no_grad():
            keys, values = expansion.expand(latents[:1, :, :1], rotary[:1, :, :1])
        known = _known_shapes[expansion.module] = keys[:, :, :0].clone(), values[:, :, :0].clone()
    return known


@torch.no_grad()
def _is_plain_expansion(expansion: Expansion, weight: torch.Tensor) -> bool:
    """Whether ``expand_kv`` computes what the absorbed form assumes, tried once per module with random latents."""
    module: Any = expansion.module
    if module not in _known_plain:
        latents, rotary = expansion.latents.new_tokens()
        generator = torch.Generator().manual_seed(0)
        c, k = (
            torch.randn(1, 1, 2, x.shape[3], generator=generator, dtype=torch.float32, device="cpu").to(x)
            for x in (latents, rotary)
        )
        keys, values = expansion.expand(c, k)
        up = _split(expansion, weight)
        expected = torch.cat([c @ up.keys.transpose(1, 2), k.expand(-1, len(up.keys), -1, -1)], -1)
        tolerance = 8 * torch.finfo(weight.dtype).eps
        _known_plain[module] = all(
            a.shape == b.shape and float((a - b).norm()) <= tolerance * float(b.norm())
            for a, b in ((keys, expected), (values, c @ up.values.transpose(1, 2)))
        )
    return _known_plain[module]
