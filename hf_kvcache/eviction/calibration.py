"""What a model's queries are like on average, measured once and kept in a file."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from hf_kvcache.integration.model_identity import check_identity, model_identity
from hf_kvcache.integration.recording import record_attention
from hf_kvcache.utils.processes import ALONE, Processes
from hf_kvcache.utils.safetensors import load_file

_FORMAT = "hf_kvcache query statistics 1"


@dataclass(frozen=True)
class LayerStatistics:
    """Averages of one layer's queries before rotary positions, as complex pairs by frequency.

    Attributes:
        mean: complex64 ``[Hq, F]``, mean pair.
        length: float32 ``[Hq, F]``, mean length of a pair.
        frequencies: float32 ``[F]``, radians per position.
    """

    mean: torch.Tensor
    length: torch.Tensor
    frequencies: torch.Tensor

    def apply(self, function: Callable[[torch.Tensor], torch.Tensor]) -> LayerStatistics:
        """The same statistics with ``function`` applied to the mean and to the length."""
        return LayerStatistics(function(self.mean), function(self.length), self.frequencies)


@dataclass(frozen=True)
class QueryStatistics:
    """Averages of a model's queries, by layer.

    Attributes:
        layers: by index of the layer; only layers with attention.
        fingerprint: of the model they were measured on.
    """

    layers: dict[int, LayerStatistics] = field(repr=False)
    fingerprint: dict[str, Any]

    def save(self, path: str | Path) -> None:
        """Write a safetensors file."""
        tensors: dict[str, torch.Tensor] = {}
        for index, layer in self.layers.items():
            parts = {"real": layer.mean.real, "imaginary": layer.mean.imag, "length": layer.length}
            parts["frequencies"] = layer.frequencies
            tensors |= {f"{index}.{name}": part.contiguous() for name, part in parts.items()}
        save_file(tensors, path, {"format": _FORMAT, "fingerprint": json.dumps(self.fingerprint)})

    @classmethod
    def load(cls, path: str | Path, config: Any = None) -> QueryStatistics:
        """Read what :meth:`save` has written, and with ``config`` check it as :meth:`check` does.

        Raises:
            ValueError: if the file is missing, is none of these, or does not fit.
        """
        accepted = "query statistics; accepted: what save() writes"
        tensors, known = load_file(path, "calibration", _FORMAT, accepted)
        layers = {}
        for index in sorted({int(name.partition(".")[0]) for name in tensors}):
            mean = torch.complex(tensors[f"{index}.real"], tensors[f"{index}.imaginary"])
            layers[index] = LayerStatistics(mean, tensors[f"{index}.length"], tensors[f"{index}.frequencies"])
        found = cls(layers, json.loads(known["fingerprint"]))
        if config is not None:
            found.check(config)
        return found

    def check(self, config: Any) -> None:
        """Raise a ValueError unless these are statistics of a model with this config."""
        check_identity("calibration", self.fingerprint, config)

    def layer(self, index: int, layers: int, heads: int, frequencies: torch.Tensor) -> LayerStatistics:
        """The statistics of one layer; raises an error if the layer differs from the one that was measured.

        Args:
            index: index of the layer in the model.
            layers: number of layers of the model.
            heads: KV heads of the layer.
            frequencies: ``[F]``, of the layer's rotary embedding.

        Raises:
            ValueError: if they were measured on another model.
        """
        known, made = self.layers.get(index), self.fingerprint.get("layers")
        if known is None or made != layers:
            raise ValueError(
                f"the calibration was made with layers={made!r}, this model has {layers}, among them {index}"
            )
        if known.mean.shape[0] % heads:
            raise ValueError(
                f"the calibration was made with heads={known.mean.shape[0]}, this model has {heads} KV heads"
            )
        frequencies = frequencies.to(known.frequencies)
        if known.frequencies.shape != frequencies.shape or not torch.allclose(
            known.frequencies, frequencies, rtol=1e-4
        ):
            raise ValueError(
                f"the calibration of layer {index} was made with other rotary frequencies than this model's"
            )
        return known


def calibrate(
    model: Any,
    texts: Sequence[str],
    tokenizer: Any,
    tokens: int = 16384,
    length: int = 2048,
    processes: Processes = ALONE,
) -> QueryStatistics:
    """Measure a model's queries on texts of the kind that it will read.

    Args:
        model: a causal language model with rotary positions.
        texts: read from the first one on until there are enough tokens.
        tokenizer: the model's.
        tokens: how many are read.
        length: tokens that are read at a time.
        processes: that each read their share of the texts; see :func:`~hf_kvcache.utils.processes.joined`.

    Raises:
        ValueError: if ``tokens`` or ``length`` is below 1, the texts have no token, or none for a process, or the model
            has no rotary embedding that can be undone.
    """
    # Not at the top: policies import this file, and policies know nothing of models.
    from hf_kvcache.integration.rope import rope_of

    sums: dict[int, _Sums] = {}

    def note(module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> None:
        rope = rope_of(module)
        total = sums.setdefault(module.layer_idx, _Sums(rope.frequencies))
        total.add(rope.pairs(rope.unrotate(query, torch.arange(query.shape[2], device=query.device))))

    record_attention(model, texts, tokenizer, tokens, length, note, processes=processes)
    processes.add_up({index: total.tensors() for index, total in sums.items()})
    if not sums:
        raise ValueError(f"model of type {model.config.model_type!r}; accepted: models with attention layers")
    return QueryStatistics({index: sums[index].means() for index in sorted(sums)}, model_identity(model.config))


@dataclass
class _Sums:
    """Running sums over a layer's queries, in float64."""

    frequencies: torch.Tensor
    mean: torch.Tensor | float = 0.0
    length: torch.Tensor | float = 0.0
    count: torch.Tensor = field(default_factory=lambda: torch.zeros(1, dtype=torch.int64, device="cpu"))

    def tensors(self) -> list[torch.Tensor]:
        """All sums, to be changed in place."""
        return [self.count, *(x for x in (self.mean, self.length) if isinstance(x, torch.Tensor))]

    def add(self, pairs: torch.Tensor) -> None:
        """Add queries as complex ``pairs [1, Hq, n, F]``."""
        pairs = pairs[0].to("cpu", torch.complex128)
        self.mean = self.mean + pairs.sum(1)
        self.length = self.length + pairs.abs().sum(1)
        self.count += pairs.shape[1]

    def means(self) -> LayerStatistics:
        mean, length = (
            torch.as_tensor(self.mean, device="cpu") / self.count,
            torch.as_tensor(self.length, device="cpu") / self.count,
        )
        return LayerStatistics(mean.to(torch.complex64), length.float(), self.frequencies)
