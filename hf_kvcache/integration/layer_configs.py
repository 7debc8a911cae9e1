"""What a config says of layers that differ from each other."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig


def layer_configs(config: PreTrainedConfig) -> list[PreTrainedConfig]:
    """The configs of the layers if they differ (Gemma 4); else a list of the one config."""
    return getattr(config, "per_layer_config", None) or [config]


def of_layers(config: PreTrainedConfig, name: str) -> Any:
    """An attribute of a config, None if it has no such one; a list with the value of each layer if they differ."""
    values = [getattr(layer, name, None) for layer in layer_configs(config)]
    return values[0] if all(value == values[0] for value in values) else values
