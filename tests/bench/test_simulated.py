"""Users who know the truth: where they point, what they frame, how they scribble, and where they click next."""

from types import SimpleNamespace

import numpy as np
import pytest

from data_prep.volume import Volume, spl_affine
from m3d.bench.metrics.masks import AfterClicks, ClicksTo, GivenDice, MaskPair, NeverReached, mask_metrics
from m3d.bench.simulated import click_on, deepest_voxel, dice, middle_of, next_click, perturbed, tell

CUBE = (1.0, 1.0, 1.0)
BOX = (slice(2, 6), slice(4, 12), slice(6, 12))


def block(shape=(8, 16, 24), at=BOX) -> np.ndarray:
    mask = np.zeros(shape, bool)
    mask[at] = True
    return mask


def ball(radius: float = 8, side: int = 31) -> np.ndarray:
    return np.linalg.norm(np.indices((side,) * 3) - side // 2, axis=0) <= radius


def volume_of(mask: np.ndarray, spacing=CUBE) -> Volume:
    return Volume(np.zeros(mask.shape, np.float32), spl_affine(spacing))


# -- the middle -----------------------------------------------------------------------------------------------------


def test_the_deepest_voxel_is_deep_in_mm():
    mask = block((9, 9, 9), (slice(0, 9), slice(2, 7), slice(1, 8)))  # 9 x 5 x 7 voxels, thin along the second axis
    assert deepest_voxel(mask, CUBE)[1] == 4
    assert deepest_voxel(mask, (1, 9, 1))[2] == 4  # 45 mm along the second axis: now the third is thin
    assert deepest_voxel(ball(4, 11), CUBE) == middle_of(ball(4, 11), CUBE) == (5, 5, 5)


def test_the_middle_of_a_ring_is_in_the_ring():
    ring = block((3, 9, 9), slice(None))
    ring[:, 2:7, 2:7] = False
    for of in (deepest_voxel, middle_of):
        at = of(ring, (2.0, 1.0, 1.0))
        assert ring[at] and at == of(np.asfortranarray(ring), (2.0, 1.0, 1.0))


def test_the_edge_of_the_scan_is_no_depth():
    assert deepest_voxel(block((8, 16, 24), slice(None)), CUBE)[0] in (3, 4)


def test_of_equally_deep_voxels_the_first_or_that_nearest_to_the_centre():
    cord = block((21, 9, 9), (slice(None), slice(3, 6), slice(3, 6)))
    assert deepest_voxel(cord, CUBE) == (1, 4, 4) and middle_of(cord, CUBE) == (10, 4, 4)


# -- what is said at once -------------------------------------------------------------------------------------------


def test_a_point_is_in_the_middle_and_is_the_first_click():
    told = tell("point", ball(), volume_of(ball()), "0/a")
    assert told.points == (((15.0, 15.0, 15.0), 1),) and told.box is None and told.mask is None
    assert next_click(np.zeros_like(ball()), ball(), CUBE) == ((15, 15, 15), True)
    assert told.in_words() == "inside (15, 15, 15)"


def test_points_lie_inside_and_near_outside_and_are_drawn_by_the_seed():
    truth = ball(4, 81)
    told = tell("points", truth, volume_of(truth, (1.0, 2.0, 4.0)), "0/a")
    assert [label for _, label in told.points] == [1, 1, 1, 0, 0]
    for at, label in told.points:
        place = tuple(map(int, at))
        assert truth[place] == bool(label)
        reach = np.abs(np.array(place) - 40) * (1.0, 2.0, 4.0)
        assert (reach <= np.array((4, 8, 16)) + 20).all()  # its own half width and 20 mm
    volume = volume_of(truth)
    assert tell("points", truth, volume, "0/a").points == tell("points", truth, volume, "0/a").points
    assert len({tell("points", truth, volume, f"0/{name}").points for name in "abcd"}) == 4
    assert tell("box+points", truth, volume, "0/a").points == tell("points", truth, volume, "0/a").points


def test_of_what_fills_the_scan_nothing_is_outside():
    full = np.ones((4, 4, 4), bool)
    assert [label for _, label in tell("points", full, volume_of(full), "s").points] == [1, 1, 1]


def test_a_scribble_runs_along_the_middle_of_the_widest_axial_slice():
    truth = block((9, 9, 24), (slice(3, 6), slice(3, 6), slice(2, 20)))
    truth[4, 2:7, 2:20] = True  # the slice that shows most
    told = tell("scribble", truth, volume_of(truth), "s")
    places = np.array([at for at, _ in told.points])
    assert {label for _, label in told.points} == {1} and len(places) == 5
    assert (places[:, 0] == 4).all() and (places[:, 1] == 4).all()  # of its 5 rows the middle one
    assert {2.0, 19.0} <= set(places[:, 2])  # from end to end


def test_a_scribble_stays_inside_what_is_bent_or_in_pieces():
    bent = block((5, 20, 20), (2, slice(2, 18), slice(2, 5)))
    bent[2, 14:18, 2:18] = bent[2, 0, 19] = True
    for at, _ in tell("scribble", bent, volume_of(bent), "s").points:
        assert bent[tuple(map(int, at))] and at != (2.0, 0.0, 19.0)
    one = block((5, 5, 5), (2, 2, 2))
    assert tell("scribble", one, volume_of(one), "s").points == (((2.0, 2.0, 2.0), 1),)


def test_the_axial_slice_is_found_in_any_orientation():
    truth = block((9, 9, 24), (slice(3, 6), slice(3, 6), slice(2, 20)))
    turned = Volume(np.zeros((24, 9, 9), np.float32), spl_affine(CUBE)[:, [2, 1, 0, 3]])
    assert turned.orientation[2] == "S"
    box = tell("slice_box", truth.transpose(2, 1, 0), turned, "s").box
    assert (box.lo, box.hi) == ((2, 3, 4), (20, 6, 5))  # thin along the body, on the middle one of equal slices


def test_boxes_are_tight():
    told = tell("box", block(), volume_of(block()), "s")
    assert (told.box.lo, told.box.hi) == ((2, 4, 6), (6, 12, 12))


def test_an_earlier_mask_is_nearly_right_and_never_empty():
    truth = ball(10, 61)
    scores = [dice(perturbed(truth, CUBE, seed), truth, CUBE) for seed in range(5)]
    assert len(set(scores)) == 5 and all(0.5 <= score < 0.9 for score in scores)
    small = block((8, 16, 24), (slice(3, 4), slice(5, 6), slice(7, 8)))  # moved by 4 mm it would mostly vanish
    assert all(perturbed(small, CUBE, seed).any() for seed in range(10))
    assert perturbed(np.ones((4, 4, 4), bool), CUBE, 0).any()
    told = tell("mask+box", truth, volume_of(truth), "s")
    assert (told.mask == tell("mask", truth, volume_of(truth), "s").mask).all() and told.box is not None
    assert told.in_words().startswith("a mask, box (")


def test_a_surface_is_moved_by_about_4_mm():
    truth = block((40, 81, 81), (slice(0, 20), slice(None), slice(None)))  # a plane, of which the middle is looked at
    heights = np.array([perturbed(truth, CUBE, seed)[:, 20:60, 20:60].sum(axis=0) for seed in range(8)])
    assert abs(heights.mean() - 20) < 3 and 2.5 < heights.std() < 5.5


def test_what_is_not_there_cannot_be_pointed_at():
    with pytest.raises(ValueError, match="the truth has no voxel"):
        tell("point", np.zeros((4, 4, 4), bool), volume_of(np.zeros((4, 4, 4))), "s")


# -- clicks ---------------------------------------------------------------------------------------------------------


def test_the_next_click_is_in_the_middle_of_the_largest_error():
    truth = block((12, 12, 12), (slice(1, 4),) * 3)
    guess = truth.copy()
    guess[3] = False  # 9 voxels are missed, in one layer
    assert next_click(guess, truth, CUBE) == ((3, 2, 2), True)
    guess[7:10, 7:10, 7:10] = True  # 27 are wrongly drawn
    assert next_click(guess, truth, CUBE) == ((8, 8, 8), False)
    assert next_click(guess, truth, CUBE, [(8, 8, 8)])[0] != (8, 8, 8)  # nobody clicks the same voxel twice
    assert next_click(truth, truth, CUBE) is None


def test_pieces_do_not_add_up():
    """Two pieces of 4 missed voxels are smaller than one of 5 that is wrongly drawn."""
    truth, guess = np.zeros((1, 9, 9), bool), np.zeros((1, 9, 9), bool)
    truth[0, 0, :4] = truth[0, 8, :4] = True
    guess[0, 4, 2:7] = True
    at, inside = next_click(guess, truth, CUBE)
    assert at[1] == 4 and not inside


class Painter:
    """An object whose mask is, after each click, the next of a list; it keeps what it was told."""

    def __init__(self, masks, begins=None) -> None:
        self.masks, self.told = list(masks), []
        self.current = SimpleNamespace(array=np.zeros_like(masks[0]) if begins is None else begins)

    def add_point(self, at, *, positive):
        self.told.append((at, positive))
        mask = self.masks[min(len(self.told), len(self.masks)) - 1]
        return SimpleNamespace(array=mask, milliseconds=float(len(self.told)))


def test_clicks_until_the_mask_is_right():
    truth = block((16, 16, 16), (slice(10, 13),) * 3)
    half = truth.copy()
    half[12] = False  # 18 of 27 voxels: Dice 36 / 45
    painter = Painter([half, truth])
    found = click_on(painter, truth, CUBE)
    assert found.dice == (0.0, 0.8, *[1.0] * 9) and found.milliseconds == (1.0, 2.0)
    assert painter.told == [((11, 11, 11), True), ((12, 11, 11), True)]
    assert found.clicks == ((11, 11, 11), (12, 11, 11)) and (found.mask == truth).all()
    assert click_on(Painter([truth], begins=truth), truth, CUBE).dice == (1.0,) * 11


# -- how clicks are judged --------------------------------------------------------------------------------------------


def pair(*steps: float) -> MaskPair:
    return MaskPair("x", block(), block(), CUBE, None, steps)


def sample(*pairs: MaskPair, failure: str | None = None):
    return SimpleNamespace(masks=pairs, failure=failure, record=SimpleNamespace(id="a"))


def test_clicks_are_counted_until_the_target_is_reached_for_the_first_time():
    reached, at_once, never = pair(0, 0.5, 0.8, 0.7), pair(0.9, 0.5), pair(0, 0.79)
    assert [ClicksTo(10).value(one) for one in (reached, at_once, never)] == [2.0, 0.0, 10.0]
    assert [NeverReached(10).value(one) for one in (reached, at_once, never)] == [0.0, 0.0, 1.0]
    assert AfterClicks(3).value(reached) == 0.7 and GivenDice().value(at_once) == 0.9
    assert ClicksTo(10).name == "NoC@80" and AfterClicks(1).name == "Dice after 1 click"


def test_a_failure_takes_the_most_clicks_and_who_does_not_say_steps_is_not_judged():
    of_clicks = {metric.name: metric for metric in mask_metrics("standard", "clicks")}
    failed = sample(pair(), failure="NoMask: x")
    values = {name: float(metric.statistics([failed])[0, 0]) for name, metric in of_clicks.items()}
    assert values["NoC@80"] == 10 and values["never Dice 0.8"] == 1 and values["Dice after 5 clicks"] == 0
    silent = {name: metric.statistics([sample(pair())])[0, 0] for name, metric in of_clicks.items()}
    assert silent["Dice"] == 1.0 and all(np.isnan(silent[name]) for name in silent if "lick" in name or "NoC" in name)
    assert np.isnan(GivenDice().statistics([failed])).all()
    assert [metric.name for metric in mask_metrics("standard", "text+mask")][-1] == "Dice of the given mask"
    assert mask_metrics("m3d", "point") == ()
