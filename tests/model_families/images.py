"""A prompt with an image in it, for families that take pixels in one of the usual forms."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from transformers import PreTrainedModel

from tests.model_families.generating import prompt

Tensors = dict[str, torch.Tensor]
#: Patches of an image in each direction, for models that take a list of patches.
_PATCHES = 4


def image_inputs(model: PreTrainedModel) -> Tensors:
    """Ids with an image token for each feature of an image, the image, and the types of the tokens.

    Families that take images in another form raise errors of their own.
    """
    image = _image(model)
    count = _features(model, image)
    token = image_token(model)
    ids = torch.cat([prompt(20), torch.full((1, count), token), prompt(30, seed=2)], 1)
    return {"input_ids": ids, **image, **token_types(model, ids == token)}


def image_token(model: Any) -> int:
    """The id of the image token."""
    token = getattr(model.config, "image_token_id", None)
    return model.config.image_token_index if token is None else token


def token_types(model: PreTrainedModel, is_image: torch.Tensor) -> Tensors:
    """The types of the tokens, under the names that the model takes."""
    takes = inspect.signature(model.forward).parameters
    return {name: is_image.long() for name in ("token_type_ids", "mm_token_type_ids") if name in takes}


def _image(model: Any) -> Tensors:
    """Pixels, and the sizes that a family takes with them."""
    takes, generator = inspect.signature(model.get_image_features).parameters, torch.Generator().manual_seed(5)
    vision = model.config.vision_config
    if "image_grid_thw" in takes:
        values = 3 * vision.patch_size**2 * getattr(vision, "temporal_patch_size", 1)
        pixels = torch.randn(_PATCHES**2, values, generator=generator)
        return {"pixel_values": pixels, "image_grid_thw": torch.tensor([[1, _PATCHES, _PATCHES]])}
    size = vision.image_size if isinstance(vision.image_size, int) else vision.image_size[0]
    image = {"pixel_values": torch.randn(1, 3, size, size, generator=generator)}
    if "image_sizes" in takes:
        image["image_sizes"] = torch.tensor([[size, size]])
    return image


@torch.no_grad()
def _features(model: Any, image: Tensors) -> int:
    """Number of tokens that the image becomes."""
    features = model.get_image_features(**image)
    features = getattr(features, "pooler_output", features)
    parts = features if isinstance(features, (list, tuple)) else [features]
    return sum(part.numel() // part.shape[-1] for part in parts)
