"""A cache does not keep a model alive."""

from __future__ import annotations

import gc
import weakref

import pytest
from torch.multiprocessing.reductions import StorageWeakRef

from tests.generation.kinds import KINDS, filled


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_goes_when_it_is_deleted(kind: str) -> None:
    """Neither a cache nor its fork holds references to modules or weights of the model."""
    model, cache = filled(kind)
    prefix = cache.fork()
    modules = [weakref.ref(module) for module in model.modules()]
    matrices = {
        name: StorageWeakRef(weight.untyped_storage()) for name, weight in model.named_parameters() if weight.dim() > 1
    }
    del model
    gc.collect()
    assert not [module() for module in modules if module() is not None]
    assert not [name for name, storage in matrices.items() if not storage.expired()]
    assert prefix.get_seq_length() == cache.get_seq_length() == 63
