"""``hf-kvcache compare``: its figures against a comparison written differently, its files, and Ctrl-C."""

from __future__ import annotations

import base64
import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DynamicCache, PreTrainedModel

from hf_kvcache import HeavyHitterCache
from hf_kvcache.cli import compare as command
from hf_kvcache.cli import compare_measure
from hf_kvcache.cli.compare_measure import compare
from hf_kvcache.cli.compare_page import page, picture
from hf_kvcache.cli.compare_text import cut_windows
from hf_kvcache.cli.main import main
from hf_kvcache.cli.reading import decoded, replace_file
from hf_kvcache.integration.binding import is_bound
from hf_kvcache.planning.caches import maker
from tests.docs.snippets import spelling_tokenizer
from tests.running import prompt, small_cache, teacher_forced

PREFIX, SUFFIX = 90, 12
TINY = ["compare", "--prefix", "300", "--suffix", "6", "--windows", "2"]


@pytest.fixture
def loaded(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> PreTrainedModel:
    monkeypatch.setattr(command, "load_default_model", lambda *_: (model, spelling_tokenizer()))
    return model


def test_against_another_way(model: PreTrainedModel) -> None:
    """Divergence, agreement and likelihood from one pass over the whole text, and bytes from the caches themselves."""
    windows = torch.cat([prompt(PREFIX + SUFFIX), prompt(PREFIX + SUFFIX, seed=1)])
    makers = {
        "none": lambda config: small_cache(model, "none"),
        "int2": lambda config: small_cache(model, "int2"),
        "kvzip": lambda config: HeavyHitterCache(
            model.config, 40, "kvzip", tail_length=4, sink_length=2, page_size=16, evict_prefill=None, interval=None
        ),
    }
    results = list(compare(model, spelling_tokenizer(), windows, PREFIX, makers))
    assert [row.name for row in results] == ["full", *makers] * 2
    full, none, int2, kvzip = results[-4:]
    assert not any(full.kl) and full.same == [1, 1] and max(none.kl) < 1e-9 and none.same == [1, 1]
    assert min(int2.kl) > 1e-4 and min(kvzip.kl) > 1e-4, "nothing was packed or evicted"
    for index, window in enumerate(windows):
        ids = window[None]
        dense = model(ids).logits[0, PREFIX - 1 : -1].double().log_softmax(-1)
        expected = -dense[torch.arange(SUFFIX), window[PREFIX:]].mean().item()
        assert full.nll[index] == pytest.approx(expected, abs=1e-5)
        cache = small_cache(model, "int2")
        found = teacher_forced(model, ids[:, :-1], cache, PREFIX - 1)[0, PREFIX - 1 :].double().log_softmax(-1)
        kl = sum((dense[n].exp() * (dense[n] - found[n])).sum().item() for n in range(SUFFIX)) / SUFFIX
        assert int2.kl[index] == pytest.approx(kl, rel=1e-3)
        assert int2.same[index] == (dense.argmax(-1) == found.argmax(-1)).double().mean().item()
        assert int2.bytes[index] == cache.memory().total
    dynamic = DynamicCache(config=model.config)
    model(windows[:1, :-1], cache=dynamic)
    assert full.bytes[0] == sum(layer.keys.nbytes + layer.values.nbytes for layer in dynamic.layers)
    assert kvzip.share < 1 and len(int2.token_ms) == 2 * (SUFFIX - 1)


class _Page(HTMLParser):
    """Collects the cells of a page, and whatever a browser would fetch."""

    def __init__(self) -> None:
        super().__init__()
        self.cells: list[str] = []
        self.fetched: list[str] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)
        self.fetched += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "data")]
        assert tag not in ("script", "link", "iframe")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "td":
            self.cells.append(data)


def test_command_and_its_files(loaded: PreTrainedModel, capsys: Any, tmp_path: Path) -> None:
    """Table, JSON, a picture, and a page that fetches nothing but the picture inside it."""
    text = tmp_path / "my <own> text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 20, encoding="utf-8")
    html, plot = tmp_path / "page.html", tmp_path / "plot.svg"
    files = ["--html", str(html), "--plot", str(plot), "--text", str(text)]
    assert main([*TINY, "--caches", "full,quantized:2,none", *files, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [(row["cache"], row["windows"]) for row in found["caches"]] == [
        ("full", 2),
        ("quantized:2", 2),
        ("none", 2),
    ]
    assert str(tmp_path) not in json.dumps(found) and found["text"] == text.name
    assert not is_bound(loaded.config)
    parsed = _Page()
    parsed.feed(html.read_text(encoding="utf-8"))
    assert parsed.open == [] and parsed.cells[0] == "full" and "quantized:2" in parsed.cells
    (image,) = parsed.fetched
    head, _, data = image.partition(",")
    assert head == "data:image/png;base64" and base64.b64decode(data, validate=True)[:4] == b"\x89PNG"
    assert "<svg" in plot.read_text(encoding="utf-8")
    assert sorted(file.name for file in tmp_path.iterdir()) == sorted([text.name, "page.html", "plot.svg"])


def test_files_are_written_once_a_window(loaded: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each time all caches have read the same windows."""
    written: list[list[int]] = []
    monkeypatch.setattr(command, "_write", lambda rows, *_: written.append([row.windows for row in rows]))
    assert main([*TINY, "--caches", "none,quantized:2"]) == 0
    assert written == [[1, 1, 1], [2, 2, 2]]


def test_interrupted(loaded: PreTrainedModel, capsys: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C in the second window leaves table and page of what was measured; in the first cache, no file at all."""
    html = tmp_path / "page.html"

    def stop_in(last: int) -> None:
        calls = iter(range(last + 1))

        def stopping(*arguments: Any) -> Any:
            steps = decoded(*arguments)
            yield next(steps)
            if next(calls) == last:
                raise KeyboardInterrupt
            yield from steps

        monkeypatch.setattr(compare_measure, "decoded", stopping)

    stop_in(3)
    assert main([*TINY, "--caches", "quantized:2", "--html", str(html)]) == 130
    out = capsys.readouterr()
    assert "quantized:2" in out.out and "interrupted" in out.err
    parsed = _Page()
    parsed.feed(html.read_text(encoding="utf-8"))
    rows = [parsed.cells[start : start + 10] for start in range(0, len(parsed.cells), 10)]
    assert [(row[0], row[-1]) for row in rows] == [("full", "2"), ("quantized:2", "1")]
    html.unlink()
    stop_in(0)
    assert main([*TINY, "--html", str(html)]) == 130
    assert not html.exists() and capsys.readouterr().out == ""


def test_a_file_is_replaced_as_a_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An interruption while it is written leaves the old content."""
    path = tmp_path / "page.html"
    replace_file(path, b"old")

    def interrupted(self: Path, content: bytes) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "write_bytes", interrupted)
    with pytest.raises(KeyboardInterrupt):
        replace_file(path, b"new")
    assert path.read_bytes() == b"old"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--caches", "quantized:4,int"], "'int'; accepted"),
        (["--prefix", "1"], "prefix=1"),
        (["--suffix", "x"], "suffix='x'; accepted"),
        (["--windows", "0"], "windows"),
        (["--text", "no/such.txt"], "--text='no/such.txt': there is no such file"),
        (["--html", "no/such/page.html"], "no such folder"),
        (["--plot", "plot.bmp"], "ends in 'bmp'; accepted"),
        (["--prefix", "50k"], "this takes 51,328 tokens, the model takes 1,024"),
        (
            ["--prefix", "500", "--text", str(Path(__file__).with_name("__init__.py"))],
            "the text has 0 tokens, prefix=500",
        ),
    ],
)
def test_bad_arguments(arguments: list[str], message: str, capsys: Any, loaded: PreTrainedModel) -> None:
    """They are refused before anything is measured."""
    assert main(["compare", *arguments]) == 1
    assert message in capsys.readouterr().err


def test_windows_begin_as_the_tokenizer_begins_texts() -> None:
    """Windows are spread over the text, do not overlap, and each has the beginning-of-text token in front."""
    plain = spelling_tokenizer()
    text = "".join(chr(ord("a") + n % 26) for n in range(103))
    ids = plain(text).input_ids
    found = cut_windows(plain, text, 20, 10, 5)
    assert found.shape == (3, 30)
    assert found[0].tolist() == ids[:30] and found[-1].tolist() == ids[-30:]
    assert found[1].tolist() == ids[36:66]

    class Beginning:
        bos_token_id = 99

        def __call__(self, text: str, add_special_tokens: bool = True, **_: object) -> Any:
            own = plain(text)
            own["input_ids"] = [99] * add_special_tokens + own["input_ids"]
            return own

    found = cut_windows(Beginning(), text, 20, 10, 5)
    assert found.shape == (3, 30) and found[:, 0].tolist() == [99] * 3
    assert found[0, 1:].tolist() == ids[:29]


def test_page_escapes_what_it_is_given(model: PreTrainedModel) -> None:
    """Names of files and models are text, and a single window has no standard error."""
    rows = {row.name: row for row in compare(model, None, prompt(40), 30, {"none": maker("none")})}
    facts = command._facts(_Arguments(), model, "<b>&.txt", prompt(40), 30)
    text = page(list(rows.values()), facts)
    assert "<b>" not in text and "&lt;b&gt;&amp;.txt" in text
    assert rows["none"].kl_error is None
    assert picture(list(rows.values()), "svg").startswith(b"<?xml")


class _Arguments:
    model, dtype = None, "fp32"
