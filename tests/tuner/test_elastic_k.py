"""The k of a batch comes out of a range, and depends on nothing but the seed and the batch."""

import pytest

from mlx_ifp.errors import IFPError
from mlx_ifp.tuner.elastic_k import KeepRange


def drawn(low: int, high: int) -> set[int]:
    return {KeepRange(low, high).draw(0, number) for number in range(400)}


def test_multiples_of_64_and_the_ends_are_drawn():
    assert drawn(512, 768) == {512, 576, 640, 704, 768}
    assert drawn(100, 200) == {100, 128, 192, 200}
    assert drawn(10, 13) == {10, 11, 12, 13}
    assert drawn(96, 96) == {96}


def test_a_batch_always_has_the_same_k():
    keep = KeepRange(64, 1536)
    first = [keep.draw(7, number) for number in range(20)]
    assert first == [keep.draw(7, number) for number in range(20)]
    assert first != [keep.draw(8, number) for number in range(20)]


@pytest.mark.parametrize(
    ("low", "high", "middle"), [(512, 1536, 1024), (500, 600, 576), (10, 13, 11), (64, 64, 64)]
)
def test_the_middle_is_in_the_range(low, high, middle):
    assert KeepRange(low, high).middle == middle


def test_ends_are_counts_or_fractions_in_any_order():
    assert KeepRange.of([1.0, 0.25], 1536, 30) == KeepRange(384, 1536)
    assert KeepRange.of([500, 0.5], 1536, 30) == KeepRange(500, 768)


@pytest.mark.parametrize(
    ("ends", "words"),
    [
        ([0.5, 1.5], "fraction of channels"),
        ([0, 64], "k must be between"),
        ([0.5, [64, 64]], "one number"),
    ],
)
def test_ends_out_of_range_are_refused(ends, words):
    with pytest.raises(IFPError, match=words):
        KeepRange.of(ends, 160, 2)
