"""Boxes to text and back, tolerantly and counted."""

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.boxes import Box
from m3d.tasks.codecs import CODECS, END, START, Frac3, make_codec

fraction = st.floats(0, 1)
interval = st.tuples(fraction, fraction).map(sorted).filter(lambda pair: pair[0] < pair[1])
thin = st.tuples(st.floats(0, 0.9995), st.floats(1e-9, 5e-4)).map(lambda pair: [pair[0], pair[0] + pair[1]])
box = st.tuples(*[st.one_of(interval, thin)] * 3).map(
    lambda sides: Box(lo=tuple(lo for lo, _ in sides), hi=tuple(hi for _, hi in sides), frame="norm")
)
READ = ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))


def corners(one: Box) -> tuple[float, ...]:
    return (*one.lo, *one.hi)


def test_published_form():
    one = Box(lo=(0.0, 0.25, 0.5), hi=(0.1234, 0.75, 1.0), frame="norm")
    assert Frac3().encode(one) == "<bx_start>[0.000, 0.250, 0.500, 0.123, 0.750, 1.000]<bx_end>"


@settings(deadline=None)  # other jobs share the cores
@given(box)
def test_round_trip_to_half_a_thousandth(one):
    codec = Frac3()
    (back,) = codec.decode("It is at " + codec.encode(one) + ".")
    assert codec.counts == {"parsed": 1}
    for lo, hi, low, high in zip(one.lo, one.hi, back.lo, back.hi, strict=True):
        # A side that both ends would round to the same number is one step long, so one of its ends is further off.
        allowed = 0.0005 if round(lo, 3) < round(hi, 3) else 0.001
        assert max(abs(lo - low), abs(hi - high)) <= allowed + 1e-9
        assert low < high


@pytest.mark.parametrize("off", [-0.0004, 0.0, 0.0004])
def test_each_of_the_1001_steps_is_what_is_written_for_it_and_for_what_lies_next_to_it(off):
    codec = Frac3()
    for step in range(1001):
        side = min(max(step / 1000 + off, 0.0), 1.0)
        if step < 1000:  # as the lower corner
            written = codec.encode(Box(lo=(side, 0.0, side), hi=(1.0, 1.0, 1.0), frame="norm"))
            assert written == f"{START}[{step / 1000:.3f}, 0.000, {step / 1000:.3f}, 1.000, 1.000, 1.000]{END}"
            (back,) = codec.decode(written)
            assert back.lo == (step / 1000, 0.0, step / 1000)
        if step > 0:  # as the upper corner
            written = codec.encode(Box(lo=(0.0, 0.0, 0.0), hi=(side, 1.0, side), frame="norm"))
            assert written == f"{START}[0.000, 0.000, 0.000, {step / 1000:.3f}, 1.000, {step / 1000:.3f}]{END}"
            (back,) = codec.decode(written)
            assert back.hi == (step / 1000, 1.0, step / 1000)


@settings(deadline=None)
@given(box)
def test_what_was_written_and_read_is_written_the_same(one):
    codec = Frac3()
    written = codec.encode(one)
    assert [codec.encode(back) for back in codec.decode(written)] == [written]


@settings(deadline=None)
@given(st.lists(box, max_size=4), st.sampled_from(["", " ", ", ", " and the spleen at ", "; 3 of 12 cm, "]))
def test_boxes_of_joined_texts_are_the_joined_boxes(boxes, between):
    codec = Frac3()
    written = [codec.encode(one) for one in boxes]
    assert codec.decode(between.join(written)) == [back for text in written for back in codec.decode(text)]
    bare = [text.removeprefix("<bx_start>").removesuffix("<bx_end>") for text in written]
    assert codec.decode(between.join(bare)) == codec.decode(between.join(written))


@settings(deadline=None)
@given(st.text() | st.text("0123456789.,-+eE%[]() \n<>bx_startend;nainf−，", max_size=200))  # noqa: RUF001
def test_any_text_is_read_without_an_error(text):
    codec = Frac3()
    boxes = codec.decode(text)
    assert codec.counts["parsed"] == len(boxes) >= codec.counts["repaired"]
    for one in boxes:
        assert all(0 <= lo < hi <= 1 for lo, hi in zip(one.lo, one.hi, strict=True))


@pytest.mark.parametrize("piece", ["[", " ", "1 ", "1", "0.1,", "<bx_start>", "<bx_start>[0.1", "(1,2,3)", "1e", "[ "])
def test_long_nonsense_is_read_in_little_time(piece):
    began = time.perf_counter()
    Frac3().decode(piece * 10_000)
    assert time.perf_counter() - began < 2


@pytest.mark.parametrize(
    ("text", "repairs"),
    [
        ("<bx_start>[0.1, 0.2, 0.3, 0.4, 0.5, 0.6]<bx_end>", set()),
        ("<bx_start> [0.100, 0.2, .3, 4e-1, 5E-1, +0.6] <bx_end>", set()),
        ("<bx_start>[0.1,0.2 ; 0.3 0.4, 0.5, 0.6]<bx_end>", {"separators"}),
        ("<bx_start>[0.4, 0.5, 0.6, 0.1, 0.2, 0.3]<bx_end>", {"swapped"}),
        ("<bx_start>[0.1, 0.2, 0.6, 0.4, 0.5, 0.3]<bx_end>", {"swapped"}),
        ("<bx_start>[0.1, 0.2, 0.3, 0.4, 0.5, 0.6", {"tokens", "brackets"}),
        ("[0.1, 0.2, 0.3, 0.4, 0.5, 0.6]<bx_end>", {"tokens"}),
        ("It is the liver, at [0.1, 0.2, 0.3, 0.4, 0.5, 0.6].", {"tokens"}),
        ("<bx_start>0.1, 0.2, 0.3, 0.4, 0.5, 0.6<bx_end>", {"brackets"}),
        ("It is at 0.1, 0.2, 0.3, 0.4, 0.5, 0.6.", {"tokens", "brackets"}),
        ("<bx_start>(0.1, 0.2, 0.3, 0.4, 0.5, 0.6)<bx_end>", {"brackets"}),
        ("<bx_start>[10%, 20%, 30%, 40%, 50%, 60%]<bx_end>", {"percent"}),
        ("<bx_start>[0,1; 0,2; 0,3; 0,4; 0,5; 0,6]<bx_end>", {"decimal_comma"}),
        ("<bx_start>[[0.1, 0.2, 0.3], [0.4, 0.5, 0.6]]<bx_end>", {"corners"}),
        ("from (0.1, 0.2, 0.3) to (0.4, 0.5, 0.6)", {"tokens", "brackets", "corners"}),
        ("<bx_start>［0.1，0.2，0.3，0.4，0.5，0.６］<bx_end>", {"separators"}),  # noqa: RUF001
    ],
)
def test_what_can_be_meant_in_one_way_is_repaired_and_counted(text, repairs):
    codec = Frac3()
    (one,) = codec.decode(text)
    assert corners(one) == pytest.approx((*READ[0], *READ[1]))
    assert codec.counts == {"parsed": 1, **dict.fromkeys(repairs, 1), **({"repaired": 1} if repairs else {})}


@pytest.mark.parametrize(
    ("numbers", "read", "repairs"),
    [
        ("-0.1, 0.2, 0.3, 0.4, 0.5, 1.6", (0, 0.2, 0.3, 0.4, 0.5, 1), {"clipped"}),
        ("−0.1, 0.2, 0.3, 0.4, 0.5, 0.6", (0, 0.2, 0.3, 0.4, 0.5, 0.6), {"clipped"}),  # noqa: RUF001
        ("0.1, 0.2, 0.3, 0.1, 0.5, 0.6", (0.1, 0.2, 0.3, 0.101, 0.5, 0.6), {"thin"}),  # inclusive, one slice
        ("1.0, 0.2, 0.3, 1.0, 0.5, 0.6", (0.999, 0.2, 0.3, 1, 0.5, 0.6), {"thin"}),
        ("0, 0, 0, 1, 1, 1", (0, 0, 0, 1, 1, 1), set()),
    ],
)
def test_what_leaves_the_scan_or_is_flat_is_made_a_box(numbers, read, repairs):
    codec = Frac3()
    (one,) = codec.decode(f"<bx_start>[{numbers}]<bx_end>")
    assert corners(one) == pytest.approx(read)
    assert set(codec.counts) == {"parsed"} | repairs | ({"repaired"} if repairs else set())


@pytest.mark.parametrize(
    "text",
    [
        "<bx_start>[0.1, 0.2, 0.3]<bx_end>",
        "<bx_start>[0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7]<bx_end>",
        "<bx_start>[100, 200, 300, 400, 500, 600]<bx_end>",  # thousandths, or voxels?
        "<bx_start>[10, 20, 30, 40, 50, 60]<bx_end>",  # percent, or voxels?
        "<bx_start>[10%, 20%, 0.3, 40%, 50%, 60%]<bx_end>",
        "<bx_start>[nan, 0.2, 0.3, 0.4, 0.5, 0.6]<bx_end>",
        "[inf, 0.2, 0.3, 0.4, 0.5, 0.6]",
        "[1e999, 0.2, 0.3, 0.4, 0.5, 0.6]",
        "<bx_start>[0.1, 0.2, oops, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8]<bx_end>",
        "<bx_start>[12.5, 0.2, 0.3, 0.4, 0.5, 0.6]<bx_end>",
        "<bx_start>[0.1, 0.2, 0.3, 0.1, 0.2, 0.3]<bx_end>",  # nothing at all
        "<bx_start>[1.1, 0.2, 0.3, 1.4, 0.5, 0.6]<bx_end>",  # beside the scan
        "<bx_start>the liver<bx_end>",
        "<bx_start><bx_end>",
        "<bx_start>",
        "[0.1, 0.2, 0.3]",
    ],
)
def test_what_can_be_meant_in_several_ways_or_none_is_unparsed(text):
    codec = Frac3()
    assert codec.decode(text) == []
    assert codec.counts == {"unparsed": 1}


@pytest.mark.parametrize(
    "text", ["", "Here is the liver [SEG].", "12, 13 (4 x 5 cm), 7, 8 [2] 0.5", "1, 2, 3, 4, 5, 6"]
)
def test_other_texts_hold_no_box(text):
    codec = Frac3()
    assert codec.decode(text) == []
    assert codec.counts == {}


def test_a_good_box_after_a_broken_one_is_read():
    codec = Frac3()
    text = "<bx_start>[0.1, 0.2<bx_start>[0.1, 0.2, 0.3, 0.4, 0.5, 0.6]<bx_end> [0.1, 0.2, 0.3, 0.4, 0.5, 0.6]"
    assert [(one.lo, one.hi) for one in codec.decode(text)] == [READ, READ]
    assert codec.counts == {"unparsed": 1, "parsed": 2, "tokens": 1, "repaired": 1}


def test_a_box_of_one_thin_voxel_can_be_said():
    one = Box(lo=(0.5, 0.0, 0.9999), hi=(0.5001, 0.0001, 1.0), frame="norm")
    assert Frac3().encode(one) == "<bx_start>[0.500, 0.000, 0.999, 0.501, 0.001, 1.000]<bx_end>"


def test_the_same_codec_writes_boxes_of_two_axes():
    codec, one = Frac3(num_axes=2), Box(lo=(0.0, 0.25), hi=(0.5, 0.75), frame="norm")
    assert codec.encode(one) == "<bx_start>[0.000, 0.250, 0.500, 0.750]<bx_end>"
    assert codec.decode(codec.encode(one)) == [one]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (Box(lo=(0, 0, 0), hi=(1, 1, 1)), "norm frame"),
        (Box(lo=(0, 0), hi=(1, 1), frame="norm"), "3 axes"),
        (Box(lo=(0, 0, 0), hi=(1, 1, 1.1), frame="norm"), "inside the image"),
    ],
)
def test_boxes_that_cannot_be_written_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        Frac3().encode(wrong)


def test_codecs_are_made_by_name_with_counters_at_zero():
    for name in CODECS:
        codec = make_codec(name)
        assert (codec.name, codec.counts) == (name, {})
    with pytest.raises(KeyError, match=r"did you mean 'm3d\.frac3'"):
        make_codec("m3d.frac")
