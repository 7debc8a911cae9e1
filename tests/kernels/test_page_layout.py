"""Where the fields of a page record lie."""

from __future__ import annotations

import pytest
import torch

from hf_kvcache.kernels.page import ALIGNMENT, PageLayout, SideFormat
from hf_kvcache.kernels.workspace import scratch, scratch_bytes

PAIRS = [
    (SideFormat(80, 3, axis="channel", group=16, other=True), SideFormat(64, 2, group=32)),
    (SideFormat(72, 8, level="float8", group=72, zero=False), SideFormat(96, 1, group=96, zero=False)),
    (SideFormat(64, 16, level="dense", dense_dtype=torch.bfloat16), SideFormat(40, 4, group=40, other=True)),
]


@pytest.mark.parametrize("page_size", [16, 64])
@pytest.mark.parametrize("formats", PAIRS)
def test_fields_are_aligned_and_apart(formats: tuple[SideFormat, SideFormat], page_size: int) -> None:
    """No two fields share a byte, all start aligned, and the record ends within an alignment of the last."""
    layout = PageLayout(*formats, page_size)
    end = 0
    for field in sorted(layout.fields.values(), key=lambda f: f.offset):
        assert field.offset % ALIGNMENT == 0 and field.offset >= end
        end = field.offset + field.nbytes
    assert end <= layout.record_bytes < end + ALIGNMENT and layout.record_bytes % ALIGNMENT == 0


@pytest.mark.parametrize("formats", PAIRS)
def test_views_write_through(formats: tuple[SideFormat, SideFormat]) -> None:
    """Writing a field through its view changes that field's bytes, all of them, in its own record only."""
    layout = PageLayout(*formats, 32)
    for name, field in layout.fields.items():
        records = torch.zeros(3, layout.record_bytes, dtype=torch.uint8)
        view = layout.view(records, name)
        assert view is not None and view.shape == (3, *field.shape) and view.dtype == field.dtype
        view[1].view(torch.uint8).fill_(7)
        changed = records.nonzero().tolist()
        assert changed == [[1, byte] for byte in range(field.offset, field.offset + field.nbytes)]


def test_fields_that_are_not_stored() -> None:
    """A zero or second scale that the format does not have is None and costs nothing."""
    layout = PageLayout(SideFormat(64, 4, group=64, zero=False), SideFormat(64, 4, group=64), 16)
    records = torch.zeros(1, layout.record_bytes, dtype=torch.uint8)
    assert layout.view(records, "keys.zero") is None and layout.view(records, "values.other") is None
    assert layout.code_bytes == 2 * 16 * 32 and layout.scale_bytes == 16 * 2 + 16 * 2 * 2


def test_scratch_is_reused_and_grows() -> None:
    """Scratch memory of a tag is one buffer that grows to the largest request; tags do not share."""
    cpu = torch.device("cpu")
    first = scratch("test-a", (4, 100), torch.float32, cpu)
    assert first.shape == (4, 100)
    held = scratch_bytes()
    assert scratch("test-a", (20, 5), torch.float32, cpu).data_ptr() == first.data_ptr()
    assert scratch_bytes() == held
    assert scratch("test-b", (10,), torch.float32, cpu).data_ptr() != first.data_ptr()
    scratch("test-a", (1000,), torch.float32, cpu)
    assert scratch_bytes() == held + 4 * 600 + 4 * 10
