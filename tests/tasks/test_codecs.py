"""Boxes to text and back, tolerantly and counted."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_prep.boxes import Box
from m3d.tasks.codecs import Frac3

side = st.tuples(st.floats(0, 1), st.floats(0, 1)).map(sorted).filter(lambda pair: pair[1] - pair[0] > 0.002)


def test_published_form():
    box = Box(lo=(0.0, 0.25, 0.5), hi=(0.1234, 0.75, 1.0), frame="norm")
    assert Frac3().encode(box) == "<bx_start>[0.000, 0.250, 0.500, 0.123, 0.750, 1.000]<bx_end>"


@given(st.tuples(side, side, side))
def test_round_trip_to_half_a_thousandth(sides):
    box = Box(lo=tuple(s[0] for s in sides), hi=tuple(s[1] for s in sides), frame="norm")
    codec = Frac3()
    (back,) = codec.decode("It is at " + codec.encode(box) + ".")
    assert max(abs(a - b) for a, b in zip((*box.lo, *box.hi), (*back.lo, *back.hi), strict=True)) <= 0.0005 + 1e-9
    assert codec.counts == {"parsed": 1}


@pytest.mark.parametrize(
    ("text", "counts"),
    [
        ("<bx_start>[0.1,0.2 ; 0.3 0.4, 0.5, 0.6]<bx_end>", {"parsed": 1}),
        ("<bx_start>[0.4, 0.5, 0.6, 0.1, 0.2, 0.3]", {"parsed": 1, "swapped": 1}),
        ("<bx_start>[-0.1, 0.2, 0.3, 0.4, 0.5, 1.6]<bx_end>", {"parsed": 1, "clipped": 1}),
        ("<bx_start>[0.1, 0.2, 0.3]<bx_end>", {"unparsed": 1}),
        ("<bx_start>[0.1, 0.2, 0.3, 0.1, 0.5, 0.6]<bx_end>", {"unparsed": 1}),  # no depth at all
        ("[0.1, 0.2, 0.3, 0.4, 0.5, 0.6]", {"parsed": 1}),
        ("Here is the liver [SEG].", {}),
        ("", {}),
    ],
)
def test_decoding_is_tolerant_and_counted(text, counts):
    codec = Frac3()
    assert len(codec.decode(text)) == counts.get("parsed", 0)
    assert codec.counts == counts


def test_several_boxes_in_order():
    codec = Frac3()
    first, second = (Box(lo=(a, 0.0, 0.0), hi=(a + 0.25, 1.0, 1.0), frame="norm") for a in (0.25, 0.5))
    assert codec.decode(codec.encode(first) + " and " + codec.encode(second)) == [first, second]


def test_voxel_boxes_are_refused():
    with pytest.raises(ValueError, match="norm frame"):
        Frac3().encode(Box(lo=(0, 0, 0), hi=(1, 1, 1)))
