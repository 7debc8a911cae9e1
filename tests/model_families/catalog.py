"""The model families, from transformers' own mappings."""

from __future__ import annotations

from typing import NamedTuple

import transformers
from transformers import PreTrainedModel
from transformers.models.auto import modeling_auto


class Family(NamedTuple):
    """A model type and its class that generates; ``task`` says which mapping has it."""

    model_type: str
    class_name: str
    task: str

    def model_class(self) -> type[PreTrainedModel]:
        """The class itself."""
        return getattr(transformers, self.class_name)


TEXT, IMAGES = "text", "images"


def families() -> list[Family]:
    """All families by name; a class that is in both mappings is listed once."""
    text = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    images = modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    found = [Family(name, cls, TEXT) for name, cls in text.items()]
    found += [Family(name, cls, IMAGES) for name, cls in images.items() if text.get(name) != cls]
    return sorted(found, key=lambda family: (family.task != TEXT, family.model_type))
