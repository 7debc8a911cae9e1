"""Which families there are: transformers' own mappings say it."""

from __future__ import annotations

from typing import NamedTuple

import transformers
from transformers import PreTrainedModel
from transformers.models.auto import modeling_auto


class Family(NamedTuple):
    """A model type and the class that generates with it; ``task`` is the mapping that names it."""

    model_type: str
    class_name: str
    task: str

    def model_class(self) -> type[PreTrainedModel]:
        """The class itself."""
        return getattr(transformers, self.class_name)


TEXT, IMAGES = "text", "images"


def families() -> list[Family]:
    """Every family, in the order of its name; one that stands in both mappings with the same class comes once."""
    text = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    images = modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    found = [Family(name, cls, TEXT) for name, cls in text.items()]
    found += [Family(name, cls, IMAGES) for name, cls in images.items() if text.get(name) != cls]
    return sorted(found, key=lambda family: (family.task != TEXT, family.model_type))
