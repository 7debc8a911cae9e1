"""Learned gates: a small map from the hidden state of a token to how much each KV head will need it.

What they are fitted to is the logarithm of KVzip+'s score (KVzap, arXiv:2601.07891; Fast KVzip, arXiv:2601.17668).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.nn.functional import gelu

from hf_kvcache.integration.layer_configs import of_layers
from hf_kvcache.integration.model_identity import check_identity, check_weights
from hf_kvcache.utils.safetensors import load_file

_FORMAT = "hf_kvcache gate 1"
#: Tokens whose hidden states are in float32 at a time.
_STRIP = 4096
#: Names of the tensors of a layer: of the only matrix, or of the two of an MLP.
_LINEAR, _MLP = ("0.weight", "0.bias"), ("0.weight", "0.bias", "2.weight", "2.bias")
#: What published KVzap models call their layers; earlier ones had the other name.
_KVZAP = ("layers.", "module_list.")


class LayerGate:
    """The map of one layer: linear, or two linear maps with a GELU between them.

    Args:
        weights: float32, ``weight [n, hidden]`` and ``bias [n]`` of each linear map, one behind the other; the last
            one has as many outputs as the layer has KV heads.
        levels: float32 ``[Q]``, equally likely scores of the layer's tokens in ascending order, over all heads; None if
            nobody has measured them.
    """

    def __init__(self, weights: Sequence[torch.Tensor], levels: torch.Tensor | None = None) -> None:
        self.weights, self.levels = tuple(weights), levels

    @property
    def heads(self) -> int:
        """KV heads."""
        return self.weights[-1].shape[0]

    @property
    def width(self) -> int:
        """Width of a hidden state."""
        return self.weights[0].shape[1]

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        """Scores, float32 ``[B, Hkv, T]``, of hidden states ``[B, T, hidden]`` on the same device."""
        if hidden.shape[1] > _STRIP:
            return torch.cat([self(part) for part in hidden.split(_STRIP, 1)], 2)
        out = hidden.float() @ self.weights[0].mT + self.weights[1]
        if len(self.weights) == len(_MLP):
            out = gelu(out) @ self.weights[2].mT + self.weights[3]
        return out.mT.contiguous()

    def to(self, device: torch.device) -> LayerGate:
        """The same map on a device."""
        return LayerGate([x.to(device) for x in self.weights], self.levels)


class Gate:
    """The maps of a model's layers.

    Args:
        layers: by index of the layer; only layers with full attention.
        fingerprint: of the model that they were fitted to; empty where a file does not say.
        samples: of its weights by layer; see :func:`~hf_kvcache.integration.model_identity.sample_weights`.
        fit: by layer, the share of the targets' variance that the map explains in tokens that it was not fitted to.
        tokens: number of tokens that were read.
    """

    def __init__(
        self,
        layers: Mapping[int, LayerGate],
        fingerprint: Mapping[str, Any],
        samples: Mapping[int, Sequence[float]] | None = None,
        fit: Mapping[int, float] | None = None,
        tokens: int = 0,
    ) -> None:
        self.layers, self.fingerprint = dict(layers), dict(fingerprint)
        self.samples, self.fit, self.tokens = dict(samples or {}), dict(fit or {}), tokens
        self._on_device: dict[tuple[int, torch.device], LayerGate] = {}
        self._digest = _digest(self.layers)
        levels = [layer.levels for _, layer in sorted(self.layers.items())]
        measured = [x for x in levels if x is not None]
        #: The places of the layers that the levels of all layers are of, from the highest level on.
        self._by_level: np.ndarray | None = None
        if levels and len(measured) == len(levels):
            owners = np.repeat(np.arange(len(levels)), [len(x) for x in measured])
            self._by_level = owners[torch.cat(measured).argsort(descending=True, stable=True).numpy()]

    def __repr__(self) -> str:
        # It stands in the settings of a saved cache, so it tells gates apart.
        return f"Gate({len(self.layers)} layers, {self._digest})"

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_on_device": {}}

    def __deepcopy__(self, memo: dict[int, Any]) -> Gate:
        return self  # nobody changes it

    def layer(self, index: int, device: torch.device) -> LayerGate:
        """The map of a layer on a device, where it stays; raises ValueError if there is none for the layer."""
        found = self._on_device.get((index, device))
        if found is None:
            if index not in self.layers:
                raise ValueError(f"gate={self!r} has no map for layer {index}; it has those of {sorted(self.layers)}")
            found = self._on_device[index, device] = self.layers[index].to(device)
        return found

    def quotas(self, quota: int, least: int, most: int) -> list[int]:
        """Tokens that a head of each layer keeps on average, such that their mean is ``quota``.

        All layers' scores are compared with one threshold, as KVzip compares the heads of all layers: a layer keeps the
        share of its tokens that was above it in the text that the gate was fitted to.

        Args:
            quota: the mean.
            least: tokens that every layer keeps.
            most: tokens that a layer can hold at all.
        """
        count, free, room = len(self.layers), quota - least, most - least
        if self._by_level is None or free <= 0 or room <= free:
            return [quota] * count
        above = max(round(free / room * len(self._by_level)), 1)
        # Rounded so that nothing is lost: the parts are differences of whole numbers whose last is the sum.
        ends = np.bincount(self._by_level[:above], minlength=count).cumsum() * (free * count) // above
        return (least + np.diff(ends, prepend=0).clip(0, room)).tolist()

    def check_config(self, config: Any) -> None:
        """Raise ValueError unless a model with this config is of the kind that the gate was fitted to."""
        if self.fingerprint:
            check_identity("gate", self.fingerprint, config)
            return
        text = config.get_text_config(decoder=True)
        heads = of_layers(text, "num_key_value_heads") or text.num_attention_heads
        given = (len(self.layers), *{(layer.heads, layer.width) for layer in self.layers.values()})
        if given != (text.num_hidden_layers, (heads, text.hidden_size)):
            raise ValueError(
                f"gate={self!r} has (layers, (KV heads, hidden size)) {given}; this model has "
                f"{(text.num_hidden_layers, (heads, text.hidden_size))}"
            )

    def check_module(self, module: torch.nn.Module, layer: int) -> None:
        """Raise ValueError unless an attention module has the weights of the model that the gate was fitted to."""
        if layer in self.samples:
            check_weights("gate", self.samples[layer], module, layer)

    def save(self, path: str | Path) -> None:
        """Write a safetensors file."""
        tensors: dict[str, torch.Tensor] = {}
        for index, layer in self.layers.items():
            tensors |= {f"{index}.{name}": x.contiguous() for name, x in zip(_MLP, layer.weights, strict=False)}
            if layer.levels is not None:
                tensors[f"{index}.levels"] = layer.levels.contiguous()
        about = {"fingerprint": self.fingerprint, "samples": self.samples, "fit": self.fit, "tokens": self.tokens}
        save_file(tensors, path, {"format": _FORMAT, "about": json.dumps(about)})

    @classmethod
    def load(cls, path: str | Path) -> Gate:
        """Read what :meth:`save` has written, or a model that KVzap's authors have published.

        Args:
            path: of the file, or of a folder with a published ``model.safetensors``.

        Raises:
            ValueError: if the file is missing, or is neither.
        """
        path = Path(path)
        path = path / "model.safetensors" if path.is_dir() else path
        if (published := _published(path)) is not None:
            return cls(published, {})
        tensors, known = load_file(
            path,
            "gate",
            _FORMAT,
            "a gate; accepted: what hf-kvcache calibrate --method gate "
            "writes, or the model.safetensors of a KVzap model",
        )
        about = json.loads(known["about"])
        layers = {}
        for index in sorted({int(name.partition(".")[0]) for name in tensors}):
            names = _MLP if f"{index}.2.weight" in tensors else _LINEAR
            layers[index] = LayerGate([tensors[f"{index}.{name}"] for name in names], tensors.get(f"{index}.levels"))
        samples, fit = ({int(index): x for index, x in about[name].items()} for name in ("samples", "fit"))
        return cls(layers, about["fingerprint"], samples, fit, about["tokens"])


def _published(path: Path) -> dict[int, LayerGate] | None:
    """The layers of a KVzap model's file (``layers.0.weight``, of an MLP ``layers.0.0.weight``); else None."""
    try:
        with safe_open(path, "pt") as file:
            names = {name: name for name in file.keys()}  # noqa: SIM118
            for prefix in _KVZAP:
                if names and all(name.startswith(prefix) for name in names):
                    tensors = {name.removeprefix(prefix): file.get_tensor(name).float() for name in names}
                    break
            else:
                return None
    except (OSError, RuntimeError, SafetensorError):
        return None  # whoever reads it next says why
    layers = {}
    for index in sorted({int(name.partition(".")[0]) for name in tensors}):
        parts = (
            (f"{index}.weight", f"{index}.bias")
            if f"{index}.weight" in tensors
            else tuple(f"{index}.{name}" for name in _MLP)
        )
        if not all(part in tensors for part in parts):
            return None
        layers[index] = LayerGate([tensors[part] for part in parts])
    return layers


def _digest(layers: Mapping[int, LayerGate]) -> str:
    digest = hashlib.sha256()
    for index in sorted(layers):
        for x in layers[index].weights:
            digest.update(x.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:12]
