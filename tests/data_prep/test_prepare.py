"""A store: what is kept reads back, masks return to the scan, and a killed run goes on to the same files."""

import dataclasses
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from data_prep.boxes import Box, box_of_mask
from data_prep.case import Case, layered
from data_prep.draft import Draft
from data_prep.phantoms import head_neck
from data_prep.prepare import Job, Local, RayCluster, prepare, prepare_case
from data_prep.prepare.job import image_id
from data_prep.prepare.many import merge_entries
from data_prep.preprocess import Foreground, Preprocess, Window
from data_prep.sources.base import Entry
from data_prep.store import Store, pack, unpack
from data_prep.volume import BadScan, Volume

PREPROCESS = Preprocess(
    grid=(24, 32, 32), spacing=(10, 8, 8), intensity=Window(-200, 400), crop=Foreground(above=-400.0)
)
JOB = Job(preprocess=PREPROCESS, derive=("rec", "seg"))


def phantom(seed: int, *, without: tuple[str, ...] = ()) -> Case:
    return head_neck(seed, shape=(32, 32, 24), spacing=(12, 12, 12), without=without)


def broken(path: Path) -> Case:
    raise BadScan(f"{path}: the file ends early; copy it again")


def missing(path: Path) -> Case:
    return Case(**{"volume": path.read_bytes()})


def deadly(path: Path) -> Case:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError(path)


def entry(number: int, *, read=None, split: str = "train", files: tuple[Path, ...] = (), drafts=()) -> Entry:
    return Entry(
        dataset="Some: Phantoms",
        license="Apache-2.0",
        image_id=f"case {number:02d}",
        patient_id=f"p{number}",
        split=split,
        files=files,
        read=read or partial(phantom, number),
        drafts=drafts,
    )


def contents(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Store:
    root = tmp_path_factory.mktemp("store") / "one"
    summary = prepare(
        [entry(1), entry(2, split="test"), entry(3, read=partial(phantom, 3, without=("larynx",)))], JOB, root
    )
    assert (summary.images, summary.prepared, summary.found, summary.rejected, summary.stale) == (3, 3, 0, 0, 0)
    return Store(root)


def test_the_layout_is_the_documented_one(store):
    names = {str(path.relative_to(store.root)) for path in store.root.rglob("*") if path.is_file()}
    folders = {name for name in names if "/" in name}
    assert names - folders == {"store.json", "preprocess.json", "records.jsonl", "images.jsonl", "rejects.jsonl"}
    assert folders == {
        f"{kind}/some-phantoms/case_{number:02d}.{suffix}"
        for number in (1, 2, 3)
        for kind, suffix in (("images", "npy"), ("masks", "npz"), ("parts", "json"))
    }


def test_an_image_is_what_preprocess_gives(store):
    image = store.images["some-phantoms/case_01"]
    prepared = PREPROCESS.apply(phantom(1).volume)
    assert np.abs(unpack(image.array()) - prepared.array).max() <= 0.5 / 255 + 1e-6
    assert np.abs(image.values() - (prepared.array * 600 - 200)).max() <= 0.5 * 600 / 255 + 1e-3
    assert np.allclose(image.affine, prepared.affine)
    assert image.media.spacing_mm == pytest.approx(np.linalg.norm(prepared.affine[:3, :3], axis=0))
    assert (image.media.orient, image.media.modality) == ("SPL", "CT")
    assert store.preprocess == PREPROCESS


def test_masks_and_boxes_return_to_the_scan(store):
    image, case = store.images["some-phantoms/case_01"], phantom(1)
    prepared = PREPROCESS.apply(case.volume)
    back = image.way.mask_to_scan(image.labels()[0])
    assert back.shape == case.volume.shape
    assert np.array_equal(back, prepared.mask_to_scan(prepared.mask_to_grid(case.labels)))
    jaw = box_of_mask(case.mask("mandible"))
    assert image.way.box_to_scan(image.way.box_to_grid(jaw)).lo == pytest.approx(jaw.lo)
    assert np.allclose(image.scan_affine, case.volume.affine)


def test_records_lie_on_the_stored_labels(store):
    image = store.images["some-phantoms/case_01"]
    labels = image.labels()
    records = store.records.of(image.image_id)
    assert {record.task for record in records} >= {"rec.box3d", "seg.sem"}
    for record in records:
        for box in record.target.boxes or ():
            value = next(value for value, name in image.names.items() if name == box.name)
            found = box_of_mask((labels == value).any(axis=0))
            assert (box.lo, box.hi) == (found.lo, found.hi)
        for mask in record.target.masks or ():
            assert (mask.path, image.names[mask.label]) == (image.masks, mask.name)
    assert all(record.patient_id == "some-phantoms/p1" for record in records)
    assert all(record.source.license == "Apache-2.0" for record in records)


def test_absence_is_recorded_where_it_is_certain(store):
    records = store.records.of("some-phantoms/case_03")
    absent = [r for r in records if (r.target.boxes == () or r.target.masks == ()) and r.subtask != "description"]
    assert absent
    assert all("larynx" in json.dumps(r.prompt.slots) for r in absent)


def test_running_again_finds_everything_and_changes_nothing(store):
    before = contents(store.root)
    stamps = {path: path.stat().st_mtime_ns for path in (store.root / "images").rglob("*.npy")}
    again = prepare(
        [entry(1), entry(2, split="test"), entry(3, read=partial(phantom, 3, without=("larynx",)))], JOB, store.root
    )
    assert (again.found, again.prepared) == (3, 0)
    assert contents(store.root) == before
    assert {path: path.stat().st_mtime_ns for path in stamps} == stamps


def test_other_settings_are_refused(store):
    with pytest.raises(ValueError, match=r"other settings \(kept, seed differ\)"):
        prepare([entry(1)], Job(preprocess=PREPROCESS, derive=("rec", "seg"), kept="uint16", seed=1), store.root)


def test_a_folder_of_something_else_is_refused(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match="is no store"):
        prepare([entry(1)], JOB, tmp_path)
    assert (tmp_path / "thesis.txt").read_text() == "mine"


def test_an_interrupted_rerun_does_not_open_as_a_whole_store(tmp_path):
    def stop(todo, outcomes):
        yield next(outcomes)
        raise KeyboardInterrupt

    scan = tmp_path / "scan"
    scan.write_text("one")
    prepare([entry(1, files=(scan,)), entry(2)], JOB, tmp_path / "store")
    assert len(Store(tmp_path / "store").images) == 2
    scan.write_text("another")
    with pytest.raises(KeyboardInterrupt):
        prepare([entry(1, files=(scan,)), entry(2)], JOB, tmp_path / "store", progress=stop)
    with pytest.raises(FileNotFoundError, match="run the same"):
        Store(tmp_path / "store")
    assert prepare([entry(1, files=(scan,)), entry(2)], JOB, tmp_path / "store").found == 2


def test_a_patient_in_two_splits_stops_the_preparation(tmp_path):
    twice = dataclasses.replace(entry(2, split="test"), patient_id="p1")
    with pytest.raises(ValueError, match="p1"):
        prepare([entry(1), twice], JOB, tmp_path / "store")
    assert not (tmp_path / "store").exists()


def test_nothing_to_prepare_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="no image to prepare"):
        prepare([], JOB, tmp_path / "store")


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"kept": "int8"}, "kept='int8' is none of uint8"),
        ({"derive": ("rek",)}, "rek cannot be derived"),
        ({"derive": "rec"}, "is no list"),
    ],
)
def test_settings_are_checked_before_anything_is_read(settings, says):
    with pytest.raises(ValueError, match=says):
        Job(**{"preprocess": PREPROCESS, **settings})


def test_stored_files_have_their_checksums(store):
    for image in store.images.values():
        assert image.files == {
            str(path.relative_to(store.root)): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in (image.path, image.mask_path)
        }


def test_every_failure_is_listed_with_its_file_and_reason(tmp_path):
    bad, gone = tmp_path / "bad.nii.gz", tmp_path / "gone.nii.gz"
    entries = [
        entry(1),
        entry(2, read=partial(broken, bad), files=(bad,)),
        entry(4, read=partial(missing, gone), files=(gone,)),
        entry(5, drafts=(Draft(task="rec.box3d", template="m3d.rec.box3d", slots={"object": "x"}, boxes=("x",)),)),
    ]
    summary = prepare(entries, JOB, tmp_path / "store")
    assert (summary.images, summary.rejected) == (1, 3)
    rejects = {reject["image_id"]: reject for reject in Store(tmp_path / "store").rejects()}
    assert rejects["some-phantoms/case_02"]["files"] == [str(bad)]
    assert rejects["some-phantoms/case_02"]["reason"].endswith("the file ends early; copy it again")
    assert rejects["some-phantoms/case_04"]["error"] == "FileNotFoundError"
    assert "no structure 'x'" in rejects["some-phantoms/case_05"]["reason"]
    assert list(Store(tmp_path / "store").images) == ["some-phantoms/case_01"]


def test_a_changed_file_is_prepared_again(tmp_path):
    scan = tmp_path / "scan"
    scan.write_text("one")
    first = prepare([entry(1, files=(scan,))], JOB, tmp_path / "store")
    scan.write_text("two, longer")
    second = prepare([entry(1, files=(scan,))], JOB, tmp_path / "store")
    assert (first.prepared, second.prepared, second.found) == (1, 1, 0)


def test_another_option_of_a_source_is_another_image_but_another_place_is_not(tmp_path):
    def told(**options) -> Entry:
        return dataclasses.replace(entry(1), read=partial(phantom, 1, **options))

    assert JOB.fingerprint(told()) != JOB.fingerprint(told(without=("larynx",)))
    here, there = (dataclasses.replace(entry(1), read=partial(broken, tmp_path / name / "a.nii")) for name in "xy")
    assert JOB.fingerprint(here) == JOB.fingerprint(there)


def test_a_report_of_the_source_is_not_joined_by_a_derived_one():
    own = Draft(task="report", template="m3d.report", text="Read by a radiologist.")
    everything = Job(preprocess=PREPROCESS)
    with_own = prepare_case(phantom(1), everything, drafts=[own]).records
    assert [r.target.text for r in with_own if r.task == "report"] == ["Read by a radiologist."]
    assert {"retrieval", "rec.box3d"} <= {r.task for r in with_own}
    assert [r.meta for r in with_own if r.task == "report"] == [{}]


def test_an_entry_that_is_no_longer_listed_is_left_out_and_counted(tmp_path):
    prepare([entry(1), entry(2)], JOB, tmp_path / "store")
    summary = prepare([entry(2)], JOB, tmp_path / "store")
    assert (summary.images, summary.stale) == (1, 1)
    assert list(Store(tmp_path / "store").images) == ["some-phantoms/case_02"]


def test_processes_give_the_same_store_and_a_killed_one_is_a_reject(tmp_path):
    good = [entry(number) for number in (1, 2, 3)]
    prepare(good, JOB, tmp_path / "serial")
    prepare(good, JOB, tmp_path / "pool", runner=Local(2))
    assert contents(tmp_path / "serial") == contents(tmp_path / "pool")
    file = tmp_path / "huge.nii.gz"
    summary = prepare(
        [*good, entry(4, read=partial(deadly, file), files=(file,))], JOB, tmp_path / "dead", runner=Local(2)
    )
    assert (summary.images, summary.rejected) == (3, 1)
    (reject,) = Store(tmp_path / "dead").rejects()
    assert (reject["error"], reject["files"]) == ("Killed", [str(file)])
    assert "killed" in reject["reason"]


@pytest.mark.slow
def test_ray_gives_the_same_store(tmp_path):
    pytest.importorskip("ray")
    file = tmp_path / "bad.nii.gz"
    entries = [entry(1), entry(2), entry(3, read=partial(broken, file), files=(file,))]
    prepare(entries, JOB, tmp_path / "serial")
    prepare(entries, JOB, tmp_path / "ray", runner=RayCluster(None, 2))
    assert contents(tmp_path / "serial") == contents(tmp_path / "ray")


SLOWLY = """
import sys, time
from pathlib import Path
sys.path.insert(0, {tests!r})
import test_prepare as t
from data_prep.prepare import prepare
entries = [t.entry(number, read=t.partial(t.slow_phantom, number)) for number in range(1, 7)]
prepare(entries, t.JOB, Path({root!r}))
"""


def slow_phantom(seed: int) -> Case:
    time.sleep(0.15)
    return phantom(seed)


def test_a_killed_run_goes_on_and_ends_at_the_same_files(tmp_path):
    entries = [entry(number, read=partial(slow_phantom, number)) for number in range(1, 7)]
    prepare(entries, JOB, tmp_path / "whole")
    root = tmp_path / "killed"
    script = SLOWLY.format(tests=str(Path(__file__).parent), root=str(root))
    run = subprocess.Popen([sys.executable, "-c", script])
    deadline = time.monotonic() + 60
    while sum(1 for _ in (root / "parts").rglob("case*.json")) < 2:
        assert run.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    run.send_signal(signal.SIGKILL)
    run.wait()
    (root / "images" / "some-phantoms" / ".deadbeef.case_05.npy").write_bytes(b"half")
    with pytest.raises(FileNotFoundError, match="run the same"):
        Store(root)
    summary = prepare(entries, JOB, root)
    assert 2 <= summary.found < 6
    assert summary.prepared == 6 - summary.found
    assert contents(root) == contents(tmp_path / "whole")


def alive(pid: int) -> bool:
    """Whether a process still runs (one that has ended and waits for its parent does not)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks for processes in /proc")
def test_workers_end_when_their_parent_is_killed(tmp_path):
    script = SLOWLY.format(tests=str(Path(__file__).parent), root=str(tmp_path / "store"))
    head, _, call = script.rpartition("prepare(entries")
    body = f"prepare(entries{call.rstrip()[:-1]}, runner=t.Local(2))"
    code = head + "if __name__ == '__main__':\n    " + body
    (tmp_path / "run.py").write_text(code)
    run = subprocess.Popen([sys.executable, str(tmp_path / "run.py")])
    deadline = time.monotonic() + 60
    while not list((tmp_path / "store" / "parts").rglob("case*.json")):
        assert run.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    children = [int(pid) for pid in Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()]
    assert len(children) >= 2
    run.kill()
    run.wait()
    while any(map(alive, children)):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_two_entries_of_one_image_are_taken_together():
    draft = Draft(task="report", template="m3d.report", text="One.")
    other = Draft(task="vqa.open", template="m3d.vqa.open", slots={"question": "?"}, text="Two.")
    read = partial(phantom, 1)
    (both,) = merge_entries([entry(1, read=read, drafts=(draft,)), entry(1, read=read, drafts=(other,))])
    assert both.drafts == (draft, other)
    with pytest.raises(ValueError, match="listed twice, with split train and test"):
        merge_entries([entry(1), entry(1, split="test")])


def test_ids_are_safe_paths():
    assert image_id(entry(7)) == "some-phantoms/case_07"
    weird = Entry(
        dataset="M3D-Seg:AbdomenCT-1K",
        image_id="../a b/ä.nii",
        patient_id="p",
        split="train",
        files=(),
        read=lambda: None,
    )
    assert image_id(weird) == "m3d-seg-abdomenct-1k/a_b_.nii"


def test_overlapping_masks_keep_both_and_a_box_of_its_own_is_moved():
    volume = phantom(1).volume
    one, two = np.zeros((2, *volume.shape), bool)
    one[8:24, 8:24, 6:18] = True
    two[12:20, 12:20, 8:16] = True
    labels, names = layered({"whole": one, "part": two})
    assert labels.shape[0] == 2
    case = Case(id="c", patient_id="p", volume=volume, labels=labels, names=names)
    exact = Job(preprocess=Preprocess(grid=(24, 32, 32), intensity=Window(-200, 400)), derive=())
    draft = Draft(
        task="rec.box3d",
        template="m3d.rec.box3d",
        slots={"object": "a finding"},
        boxes=(Box((12, 12, 8), (20, 20, 16), "voxel", "a finding"), "part"),
    )
    done = prepare_case(case, exact, identity="d/c", drafts=[draft])
    mine, part = done.records[0].target.boxes
    assert (mine.lo, mine.hi) == (part.lo, part.hi)  # the same voxels, once by matrix and once by mask
    way = done.image.way
    assert np.array_equal(way.mask_to_scan((done.labels == 1).any(axis=0)), one)
    assert np.array_equal(way.mask_to_scan((done.labels == 2).any(axis=0)), two)


def test_what_vanishes_on_a_coarse_grid_is_told():
    volume = Volume(np.random.default_rng(0).normal(0, 100, (40, 40, 40)), np.diag([2.0, 2.0, 2.0, 1.0]))
    labels = np.zeros(volume.shape, np.uint8)
    labels[21, 21, 21] = 1
    case = Case(id="c", patient_id="p", volume=volume, labels=labels, names={1: "pearl"})
    coarse = Job(preprocess=Preprocess(grid=(4, 4, 4), intensity=Window(-200, 400)), derive=())
    draft = Draft(task="seg.sem", template="m3d.seg.sem", slots={"objects": ["pearl"]}, masks=("pearl",))
    done = prepare_case(case, coarse, identity="d/c", drafts=[draft])
    assert done.records == []
    assert "pearl has no voxel left" in done.dropped[0]["reason"]


def test_a_ct_without_air_is_doubted():
    case = phantom(1)
    assert not any("Hounsfield" in warning for warning in prepare_case(case, JOB).image.warnings)
    grey = dataclasses.replace(case, volume=Volume(case.volume.array + 1000, case.volume.affine))
    assert any("Hounsfield" in warning for warning in prepare_case(grey, JOB).image.warnings)


def test_a_scan_without_place_gives_no_spacing():
    case = phantom(1)
    case = Case(
        id="c", patient_id="p", volume=case.volume, labels=case.labels, names=case.names, placed=False, unit="norm01"
    )
    media = prepare_case(case, Job(preprocess=PREPROCESS, derive=())).image.media
    assert (media.spacing_mm, media.orient, media.intensity.of) == (None, None, "arbitrary")


@pytest.mark.parametrize(("kept", "error"), [("uint8", 0.5 / 255), ("uint16", 0.5 / 65535), ("float32", 0.0)])
def test_packing_rounds_to_half_a_step(kept, error):
    values = np.linspace(0, 1, 10_001, dtype=np.float32)
    assert np.abs(unpack(pack(values, kept)) - values).max() <= error + 1e-7
    assert pack(values, kept).dtype.name == kept


def test_a_broken_store_file_names_itself(tmp_path):
    prepare([entry(1)], JOB, tmp_path / "store")
    image = Store(tmp_path / "store").images["some-phantoms/case_01"]
    image.path.write_bytes(image.path.read_bytes()[:500])
    with pytest.raises(BadScan, match=r"case_01\.npy: broken .*delete it"):
        image.array()
    image.mask_path.unlink()
    with pytest.raises(BadScan, match=r"case_01\.npz: missing"):
        image.labels()
    again = prepare([entry(1)], JOB, tmp_path / "store")
    assert again.prepared == 1  # the mask was gone
