"""Labels in a crowd: the boxes that the renderer draws do not overlap."""

from __future__ import annotations

import itertools
import random
from pathlib import Path

import pytest
from matplotlib.text import Text

from hf_kvcache_eval.report.labels import Box, Label, place
from hf_kvcache_eval.report.style import figure, save, styles


@pytest.mark.parametrize(("seed", "count"), [(0, 20), (1, 30), (2, 40)])
def test_no_label_covers_another_or_a_marker(seed: int, count: int) -> None:
    draw = random.Random(seed)
    drawn = figure(8.6, 5.4)
    plot = drawn.subplots()
    plot.set_yscale("log")
    plot.set_xlim(0, 1.2)
    plot.set_ylim(1e-4, 10)
    # Most points lie in two crowds, as caches of equal bits do.
    names = [f"rotated{i}+int4" for i in range(count)]
    x = [draw.choice([0.3, 0.5]) + draw.gauss(0, 0.02) for _ in names]
    y = [10 ** (draw.choice([-2, -1]) + draw.gauss(0, 0.15)) for _ in names]
    labels = [Label(*spot, "k") for spot in zip(x, y, names, strict=True)]
    plot.plot([p.x for p in labels], [p.y for p in labels], "o", markersize=6)
    drawn.draw_without_rendering()
    drawn.set_layout_engine("none")
    notes = place(plot, labels)
    assert len(notes) == count
    drawn.draw_without_rendering()  # annotations move to their places when they are drawn
    renderer = drawn.canvas.get_renderer()  # type: ignore[attr-defined]
    boxes = [Box(*Text.get_window_extent(note, renderer).extents) for note in notes]
    assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))
    inside = Box(*plot.get_window_extent(renderer).extents)
    assert all(inside.holds(box.x0, box.y0) and inside.holds(box.x1, box.y1) for box in boxes)
    markers = [plot.transData.transform((p.x, p.y)) for p in labels]
    assert not any(box.holds(*marker) for box in boxes for marker in markers)


def test_what_has_no_room_is_left_out() -> None:
    drawn = figure(1.2, 0.8)
    plot = drawn.subplots()
    plot.set_xlim(0, 1)
    plot.set_ylim(0, 1)
    drawn.draw_without_rendering()
    assert place(plot, [Label(0.5, 0.5, "a name that is much too long for this plot", "k")]) == []
    assert not plot.texts


def test_every_cache_of_a_family_has_one_color_and_marker() -> None:
    found = styles(["full", "full:dtype=bfloat16", "int2", "int4", "rotated4", "random@0.3", "window@8"])
    assert (found["int2"].color, found["int2"].marker) == (found["int4"].color, found["int4"].marker)
    assert found["int2"].line != found["int4"].line
    assert found["int2"].color != found["rotated4"].color and found["int2"].marker != found["rotated4"].marker
    assert found["random@0.3"].line != found["window@8"].line


def test_a_picture_does_not_tell_the_time(tmp_path: Path) -> None:
    files = [tmp_path / name for name in ("a.png", "b.png")]
    for file in files:
        drawn = figure(2, 2)
        drawn.subplots().plot([1, 2])
        save(drawn, file)
    assert files[0].read_bytes() == files[1].read_bytes()
