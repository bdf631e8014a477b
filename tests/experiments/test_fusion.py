"""The fusion benchmark: its exponents, its tables, and that it measures what it says."""

import pytest

from experiments.benchmarks import fusion


@pytest.mark.parametrize("power", [1, 2, 3])
def test_the_exponent_of_a_power_is_the_power(power):
    sizes = (2, 5, 11, 20, 50)
    assert fusion.exponent(sizes, [7.0 * size**power for size in sizes]) == pytest.approx(power)


def test_operations_grow_as_they_should():
    """The sampler linearly in both, concatenation with the square, in programs that never run."""
    multiway, concat = (fusion.growth(kind) for kind in ("multiway", "concat"))
    for name in ("frames_exponent", "words_exponent"):
        assert multiway[name] == pytest.approx(1, abs=0.1)
        assert concat[name] == pytest.approx(2, abs=0.25)
    assert len(multiway["flops_by_frames"]) == len(multiway["flops_by_words"]) == 5


def test_tables():
    mib = {"multiway": 10.0, "cross_attention": 20.0, "concat": 1234.0}
    rows = [{"kind": k, "frames": 4, "words": 40, "mib": v} for k, v in mib.items()]
    assert "| 4 | 40 | 10 | 20 | 1,234 | 123.4 |" in fusion.format_memory(rows)
    times = [{"kind": "concat", "secs_per_clip": 2.0, "ratio": 3.0, "ratio_range": [2.5, 3.5]}]
    assert "| concat | 2.00 | 3.00 (2.50-3.50) |" in fusion.format_times(times)


def test_the_plot_has_a_panel_for_each_text(tmp_path):
    rows = [
        {"kind": kind, "frames": frames, "words": words, "mib": frames * words}
        for kind in fusion.KINDS
        for frames in (4, 8)
        for words in (40, 128)
    ]
    fusion.plot_memory(rows, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
