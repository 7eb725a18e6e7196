"""OpenKBP: folders of NIfTI, and the public repository's CSV behind a local server."""

import hashlib
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import nibabel as nib
import numpy as np
import pytest

from data_prep.openkbp import DEMO_CASE, NAMES, FetchFailed, RemoteCase, cases, fetch_case, read_case
from data_prep.volume import BadScan, array_sha256

SIDE, SLICES = 6, 4
FILES = ("Brainstem", "SpinalCord", "RightParotid", "LeftParotid", "Esophagus", "Larynx", "Mandible")


def flat(i, j, k):
    return (i * SIDE + j) * SIDE + k


def miniature():
    """Files as the repository has them, and the arrays that they say, written down by hand."""
    hu = np.full((SIDE, SIDE, SLICES), -1000, np.int16)
    hu[1, 2, 3], hu[4, 0, 0], hu[0, 5, 2] = 37, 2071, -1000 + 76
    labels = np.zeros((SIDE, SIDE, SLICES), np.uint8)
    files = {"ct.csv": f",data\n{flat(0, 5, 2)},76.0\n{flat(1, 2, 3)},1037.0\n{flat(4, 0, 0)},3071.0\n"}
    for label, name in enumerate(FILES, start=1):
        labels[label - 1 if label < 7 else 5, 2, 1] = label
        files[f"{name}.csv"] = f",data\n{flat(label - 1 if label < 7 else 5, 2, 1)},\n"
    labels[5, 2, 1] = 6  # larynx and mandible overlap there: the first keeps it
    labels[5, 5, 3] = 7
    files["Mandible.csv"] += f"{flat(5, 5, 3)},\n"
    return files, hu, labels


@pytest.fixture
def served():
    """A server of a mutable table of files, with a ``pause`` before the bytes, a ``drip`` between, ``missing`` ones."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            name = self.path.rsplit("/", 1)[-1]
            Handler.asked.append(self.path)
            if name not in Handler.files:
                self.send_error(404)
                return
            body = Handler.files[name].encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body) + Handler.missing.get(name, 0)))
            self.end_headers()
            time.sleep(Handler.pause)
            for at in range(0, len(body), 5) if Handler.drip else [0]:
                self.wfile.write(body[at : at + 5] if Handler.drip else body)
                time.sleep(Handler.drip)

        def log_message(self, *args):
            pass

    Handler.files, Handler.hu, Handler.labels = miniature()
    Handler.asked, Handler.missing, Handler.pause, Handler.drip = [], {}, 0.0, 0.0
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    Handler.url = f"http://127.0.0.1:{server.server_port}/validation-pats"
    yield Handler
    server.shutdown()
    server.server_close()


def wanted(served, **changes):
    known = {
        "patient": "pt_9",
        "spacing": (4.0, 3.0, 2.5),
        "num_slices": SLICES,
        "side": SIDE,
        "ct_sha256": hashlib.sha256(b"(6, 6, 4)" + served.hu.astype("<i2").tobytes()).hexdigest(),
        "structures_sha256": hashlib.sha256(b"(6, 6, 4)" + served.labels.tobytes()).hexdigest(),
    }
    return RemoteCase(**(known | changes))


def test_a_case_is_fetched_converted_and_kept(served, tmp_path):
    folder = fetch_case(tmp_path / "cache", remote=wanted(served), base_url=served.url)
    case = read_case(folder)
    assert np.array_equal(case.volume.array, served.hu)
    assert np.array_equal(case.labels, served.labels)
    assert (case.id, case.complete, case.cut_by_crop) == ("pt_9", False, ())
    assert case.volume.orientation == "PLI"
    assert case.volume.spacing == (4.0, 3.0, 2.5)
    assert np.allclose(case.volume.to_mm([[2.5, 2.5, 1.5]]), 0)  # the middle of the array
    assert np.allclose(case.volume.to_mm([[3.5, 2.5, 1.5]]), [[0, -4, 0]])  # the first index grows to posterior
    assert nib.load(folder / "ct.nii.gz").get_data_dtype() == np.int16
    assert "MIT" in (folder / "CREDIT.txt").read_text()
    assert len(served.asked) == 8

    assert fetch_case(tmp_path / "cache", remote=wanted(served), base_url="http://127.0.0.1:9/nowhere") == folder
    assert len(served.asked) == 8


def test_a_broken_file_in_the_cache_is_fetched_again(served, tmp_path):
    folder = fetch_case(tmp_path, remote=wanted(served), base_url=served.url)
    (folder / "ct.nii.gz").write_bytes(b"half a file")
    fetch_case(tmp_path, remote=wanted(served), base_url=served.url)
    assert np.array_equal(read_case(folder).volume.array, served.hu)


def refused(served, tmp_path, match, *, remote=None, timeout=5.0):
    with pytest.raises(FetchFailed, match=match) as caught:
        fetch_case(tmp_path / "cache", remote=remote or wanted(served), base_url=served.url, timeout=timeout)
    assert isinstance(caught.value, OSError)
    assert not list(tmp_path.rglob("*.nii.gz"))
    assert "\n" not in str(caught.value)


def test_another_ct_or_other_contours_are_refused(served, tmp_path):
    refused(served, tmp_path, "ct has checksum", remote=wanted(served, ct_sha256="0" * 64))
    refused(served, tmp_path, "structures has checksum", remote=wanted(served, structures_sha256="0" * 64))


def test_a_download_that_breaks_off_is_refused(served, tmp_path):
    served.missing["ct.csv"] = 10
    refused(served, tmp_path, r"ct.csv: .*(broke off|downloaded)")


def test_a_missing_file_is_named(served, tmp_path):
    del served.files["Larynx.csv"]
    refused(served, tmp_path, r"Larynx.csv: the server answered 404")


def test_a_silent_server_is_given_up(served, tmp_path):
    served.pause = 3.0
    started = time.monotonic()
    refused(served, tmp_path, "timed out", timeout=0.2)
    assert time.monotonic() - started < 2.0


def test_a_dripping_server_is_given_up(served, tmp_path, monkeypatch):
    monkeypatch.setattr("data_prep.openkbp.TOTAL_SECONDS", 0.3)
    served.drip = 0.05  # each wait is short, the whole too long
    refused(served, tmp_path, "not finished", timeout=0.2)


def test_offline_is_named(tmp_path):
    with pytest.raises(FetchFailed, match="could not be downloaded"):
        fetch_case(tmp_path, base_url="http://127.0.0.1:9/validation-pats", timeout=1.0)


@pytest.mark.parametrize("body", ["<html>sign in</html>\n<p>,x</p>\n", f",data\n{SIDE**3},5.0\n", ",data\n-1,5.0\n"])
def test_other_content_is_refused(served, tmp_path, body):
    served.files["ct.csv"] = body
    refused(served, tmp_path, r"ct.csv: (not the CSV|an index)")


def test_a_huge_answer_is_cut_short(served, tmp_path, monkeypatch):
    monkeypatch.setattr("data_prep.openkbp.LARGEST_BYTES", 20)
    refused(served, tmp_path, "not the file that was expected")


def write_case(folder, hu, labels, affine=None):
    folder.mkdir(parents=True)
    affine = np.diag([-2.0, -2.0, -3.0, 1.0]) if affine is None else affine
    nib.Nifti1Image(hu, affine).to_filename(folder / "ct.nii.gz")
    nib.Nifti1Image(labels, np.diag([-2.0, -2.0, -3.0, 1.0])).to_filename(folder / "structures.nii.gz")


def test_cases_are_in_the_order_of_their_numbers(tmp_path):
    _, hu, labels = miniature()
    for number in (10, 9, 101):
        write_case(tmp_path / "train" / f"pt_{number}", hu, labels)
    (tmp_path / "train" / "notes").mkdir()
    assert [path.name for path in cases(tmp_path, "train")] == ["pt_9", "pt_10", "pt_101"]
    with pytest.raises(FileNotFoundError, match="validation: no OpenKBP case"):
        cases(tmp_path, "validation")


def test_what_the_crop_cut_is_said_beside_the_splits(tmp_path):
    _, hu, labels = miniature()
    write_case(tmp_path / "train" / "pt_1", hu, labels)
    write_case(tmp_path / "train" / "pt_2", hu, labels)
    (tmp_path / "cases.json").write_text('[{"patient": "pt_2", "cut_by_crop": ["spinal cord"]}]')
    assert read_case(tmp_path / "train" / "pt_1").cut_by_crop == ()
    assert read_case(tmp_path / "train" / "pt_2").cut_by_crop == ("spinal cord",)
    (tmp_path / "cases.json").write_text("{")
    with pytest.raises(BadScan, match=r"cases\.json"):
        read_case(tmp_path / "train" / "pt_1")


def test_contours_that_do_not_fit_their_ct_are_refused(tmp_path):
    _, hu, labels = miniature()
    write_case(tmp_path / "a", hu, labels[:5])
    write_case(tmp_path / "b", hu, labels, np.diag([2.0, -2.0, -3.0, 1.0]))
    write_case(tmp_path / "c", hu, labels + 3)
    for name, match in (("a", "differs"), ("b", "differs"), ("c", "no OpenKBP labels")):
        with pytest.raises(BadScan, match=match):
            read_case(tmp_path / name)
    (tmp_path / "a" / "structures.nii.gz").unlink()
    with pytest.raises(FileNotFoundError, match=r"structures\.nii\.gz"):
        read_case(tmp_path / "a")


def test_real_cases_read_and_the_pinned_one_is_the_known_one(shared_data):
    root = shared_data / "data" / "openkbp"
    assert (len(cases(root, "train")), len(cases(root, "validation"))) == (128, 21)
    case = read_case(root / "validation" / DEMO_CASE.patient)
    assert array_sha256(case.volume.array.astype(np.int16)) == DEMO_CASE.ct_sha256
    assert array_sha256(case.labels) == DEMO_CASE.structures_sha256
    assert case.volume.orientation == "PLI"
    assert np.allclose(case.volume.spacing, DEMO_CASE.spacing)
    assert set(np.unique(case.labels)) == {0, *NAMES}


def test_the_real_case_comes_back_from_csv(shared_data, served, tmp_path):
    """The known conversion, undone to CSV, served and fetched with the pinned checksums."""
    case = read_case(shared_data / "data" / "openkbp" / "validation" / DEMO_CASE.patient)
    full = np.zeros((128, 128, 128))
    full[:, :, : DEMO_CASE.num_slices] = case.volume.array + 1000
    at = np.flatnonzero(full)
    served.files["ct.csv"] = ",data\n" + "".join(f"{i},{v:.1f}\n" for i, v in zip(at, full.ravel()[at], strict=True))
    assert len(served.files["ct.csv"]) == 4_118_243  # as long as the public file
    for label, name in enumerate(FILES, start=1):
        full[:] = 0
        full[:, :, : DEMO_CASE.num_slices] = case.labels == label
        served.files[f"{name}.csv"] = ",data\n" + "".join(f"{i},\n" for i in np.flatnonzero(full))
    folder = fetch_case(tmp_path, base_url=served.url)
    again = read_case(folder)
    assert np.array_equal(again.labels, case.labels)
    assert np.allclose(again.volume.affine, case.volume.affine, atol=1e-3)
