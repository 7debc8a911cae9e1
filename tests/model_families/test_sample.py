"""A sample of ``make families``: docs/models.md is right for these families, and the tool notices faults."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from hf_kvcache import HeavyHitterCache, KVCache
from tests.model_families.building import NotBuilt, build
from tests.model_families.caches import KINDS, Kind
from tests.model_families.catalog import IMAGES, TEXT, Family, families
from tests.model_families.generating import Outcome, generate, prompt
from tests.model_families.modes import MODES
from tests.model_families.shrinking import tiny_config
from tests.model_families.summary import cells
from tests.model_families.trial import try_family
from tests.model_families.verdicts import CRASHED, DENSE, NOT_TRIED, REFUSED, WORKS, WRONG, compare
from tests.model_families.writing import WORDS

#: One family of each kind: plain, outside the attention interface, ALiBi, sliding, hybrid, latents, images, ...
SAMPLE = (
    "llama",
    "gpt2",
    "bloom",
    "falcon",
    "gemma2",
    "qwen3_next",
    "deepseek_v3",
    "gpt_oss",
    "opt",
    "mamba",
    "llava",
    "qwen2_vl",
)
_KINDS = [kind for kind in KINDS if kind.name in ("none", "4 bits", "attention")]
_MODES = tuple(mode for mode in MODES if mode.name in ("greedy", "padded batch", "crop", "state dict"))
_TABLE = Path(__file__).parents[2] / "docs" / "models.csv"


def _parameters() -> list[object]:
    return [
        pytest.param(family, id=f"{family.task}-{family.model_type}", marks=[] if sampled else [pytest.mark.slow])
        for family in families()
        for sampled in [family.model_type in SAMPLE]
    ]


@pytest.mark.parametrize("family", _parameters())
def test_nothing_is_wrong(family: Family) -> None:
    """Caches of three kinds are right or refused, and nothing is refused that works in the table."""
    try:
        found = cells(try_family(family, tuple(_KINDS), _MODES))
    except NotBuilt as error:
        pytest.skip(str(error))
    bad = {name: cell for name, cell in found.items() if cell.status in (WRONG, CRASHED)}
    assert not bad
    for name, expected in _recorded(family).items():
        if name in found and expected in (WORDS[WORKS], WORDS[DENSE]):
            assert found[name].status in (WORKS, DENSE, NOT_TRIED), f"{name}: {found[name]}"


def _recorded(family: Family) -> dict[str, str]:
    """The words of the table for the statuses, if it was made with the installed release of transformers."""
    if not _TABLE.exists():
        return {}
    lines = _TABLE.read_text().splitlines()
    if lines[0].split()[-1] != transformers.__version__:
        return {}
    rows = csv.DictReader(lines[1:])
    return next((row for row in rows if (row["model_type"], row["task"]) == (family.model_type, family.task)), {})


def test_every_class_is_found() -> None:
    """transformers' mappings have many families, and the configs of the sample become small."""
    found = families()
    assert sum(family.task == TEXT for family in found) > 150
    assert sum(family.task == IMAGES for family in found) > 60
    for name in SAMPLE:
        assert tiny_config(name).get_text_config(decoder=True).vocab_size <= 128


def test_models_of_several_stacks_are_refused() -> None:
    """A byte-level model has an encoder, a global model and a decoder, and its config has no number of layers."""
    with pytest.raises(ValueError, match=r"'blt' says nothing of its layers \(num_hidden_layers\); accepted"):
        KVCache(tiny_config("blt"))


def test_positions_end_with_the_models_table() -> None:
    """GPT-J reads its angles from a table, beyond whose end a policy that undoes rotations must not read."""
    (family,) = (family for family in families() if family.model_type == "gptj")
    model = build(family)
    with pytest.raises(ValueError, match=r"GPTJAttention (cannot be undone: its keys are not a|of transformers)"):
        generate(model, prompt(), HeavyHitterCache(model.config, 32, "expected", tail_length=8, page_size=16), 1)


def _llama(make: object) -> dict[str, str]:
    kind = Kind("trial", make, modes=("greedy", "state dict"))  # type: ignore[arg-type]
    (family,) = (family for family in families() if family.model_type == "llama")
    return {mode: verdict.status for mode, verdict in try_family(family, (kind,))["trial"].items()}


class _Wrong(KVCache):
    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: object, **kwargs: object) -> Any:
        return super().update(key_states, value_states * 1.001, *args, **kwargs)  # type: ignore[arg-type]


class _Crashing(KVCache):
    def state_dict(self) -> dict[str, torch.Tensor]:
        return {"": torch.zeros(2) @ torch.zeros(3)}


class _Refusing(KVCache):
    def state_dict(self) -> dict[str, torch.Tensor]:
        self.crop(1)
        return {}


class _Unused(KVCache):
    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: object, **kwargs: object) -> Any:
        return key_states, value_states


@pytest.mark.parametrize(
    ("cache", "mode", "status"),
    [
        (KVCache, "greedy", WORKS),
        (_Wrong, "greedy", WRONG),
        (_Unused, "greedy", WRONG),
        (_Crashing, "state dict", CRASHED),
        (_Refusing, "state dict", REFUSED),
    ],
)
def test_faults_are_noticed(cache: type[KVCache], mode: str, status: str) -> None:
    """A cache that is slightly wrong, not used, crashes or refuses gets that verdict."""
    assert _llama(cache)[mode] == status


def test_comparison_ends_where_tokens_differ() -> None:
    """For quantized caches, logits after the first different token are not compared; for exact caches they are."""
    right = Outcome(torch.tensor([[1, 2, 3]]), torch.randn(1, 3, 8))
    logits = right.logits.clone()
    logits[0, 2] += 9.0
    other = Outcome(torch.tensor([[1, 7, 3]]), logits)
    assert compare(other, [right], bound=0.1).status == WORKS
    assert compare(other, [right]).status == WRONG
    assert compare(Outcome(right.tokens, logits), [right], bound=0.1).status == WRONG
