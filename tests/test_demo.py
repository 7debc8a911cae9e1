"""The demo and the command line, on a tiny model."""

from __future__ import annotations

import io
import re

import pytest
import torch
from rich.console import Console
from rich.progress import Progress
from transformers import PreTrainedModel

from hf_kvcache import codecs, eviction
from hf_kvcache.cli.demo import QUESTION, measure
from hf_kvcache.cli.demo_display import build_table, build_texts
from hf_kvcache.cli.demo_options import FULL
from hf_kvcache.cli.main import main
from hf_kvcache.cli.reading import kl_by_token, top1_agreement
from hf_kvcache.sparse import registry as selectors
from tests.running import prompt


class _Tokenizer:
    """A tokenizer that decodes a token as its number."""

    def decode(self, tokens: torch.Tensor, **_: object) -> str:
        return " ".join(str(token) for token in tokens.tolist())


def test_measure(model: PreTrainedModel) -> None:
    """Caches are compared with the full one. Dense pages agree with it; fewer bits hold fewer bytes and differ more."""
    with Progress(console=Console(quiet=True)) as progress, torch.no_grad():
        rows = measure(model, _Tokenizer(), prompt(600), ["none", "8-bit", "2-bit"], 6, progress)
    full, dense, eight, two = rows
    assert [row.name for row in rows] == [FULL, "none", "8-bit", "2-bit"]
    assert full.bytes_held > 0 and full.ratio == 1 and full.kl == 0
    assert dense.kl < 1e-9 and dense.agreement == 1 and dense.text == full.text
    assert 0 < eight.kl < two.kl
    assert two.bytes_held < eight.bytes_held < dense.bytes_held
    console = Console(width=100, file=io.StringIO())
    console.print(build_table(rows), build_texts(QUESTION, rows))
    assert "2-bit" in console.file.getvalue()


def test_comparison_by_hand() -> None:
    """KL and agreement of two distributions over two tokens, worked out on paper."""
    full, other = torch.tensor([[0.0, 0.0]]), torch.tensor([[0.0, 3.0]]).exp().log()
    probability = 1 / (1 + torch.tensor(3.0).exp())
    expected = 0.5 * (0.5 / probability).log() + 0.5 * (0.5 / (1 - probability)).log()
    assert kl_by_token(full, other).item() == pytest.approx(expected.item(), rel=1e-6)
    assert top1_agreement(torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([[2.0, 0.0], [1.0, 0.0]])) == 0.5


def test_info_lists_codecs_and_policies(capsys: pytest.CaptureFixture[str]) -> None:
    """``hf-kvcache info`` names everything that is registered."""
    assert main(["info"]) == 0
    printed = capsys.readouterr().out
    names = (*codecs.available(), *eviction.available(), *eviction.wrappers(), *selectors.available())
    assert all(name in printed for name in names)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--caches", "5-bit"], "5-bit.*accepted"), (["--max-new-tokens", "0"], "max_new_tokens.*0")],
)
def test_bad_arguments(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    """An unknown cache, or a length below 1, is refused before a model is loaded."""
    assert main(["demo", *arguments]) == 1
    assert re.search(message, capsys.readouterr().err)
