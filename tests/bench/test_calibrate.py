"""What is certain of a store's scans, asking that goes on after a stop, and the command, with a rule for a model."""

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace

import pytest

import m3d
from data_prep.store import Store
from m3d.bench import calibrate
from m3d.bench.calibrate import Answers, Asked, ask_scans, certain, fit_to, judge
from m3d.cli import main
from m3d.inference import checkpoints
from m3d.inference.checkpoints import weights_sha256
from m3d.inference.presence import PRESENCE_NAME, WEIGHED, Presence, Signs, read_presence
from tests.fixtures.small_store import PREPROCESS, build, edit, labels, save_labels

ABOUT = {"weights_sha256": "f" * 64}


@pytest.fixture
def store(tmp_path):
    """Liver and spleen in two scans; the third, of which the labels are complete too, has no spleen."""
    root = build(tmp_path / "mini")
    only = labels()
    only[only == 2] = 0
    save_labels(root, "mini/c", only)
    return root


@pytest.fixture
def looks(monkeypatch):
    """A model that sees a spleen in scans a and b alone; the scans that it looked at."""
    seen = []
    monkeypatch.setattr(calibrate, "BenchCase", lambda case, _: SimpleNamespace(open=lambda: Opened(case.id)))
    monkeypatch.setattr(calibrate.Scan, "of_prepared", lambda *facts: seen.append(facts[-1]) or facts[-1])
    monkeypatch.setattr(calibrate, "signs_of", lambda scan, names: [signs_in(scan, name) for name in names])
    return seen


class Opened:
    def __init__(self, scan: str) -> None:
        self.scan = scan

    def prepared(self, preprocess) -> str:
        return self.scan


def signs_in(scan: str, name: str) -> Signs:
    sees = name == "liver" or (name == "spleen" and scan != "mini/c")
    return Signs(said=4.0 if sees else -4.0, peak=5.0 if sees else -5.0, extent=float(sees), inside=0.5, grey=None)


MODEL = SimpleNamespace(id="rule", model=None, processor=SimpleNamespace(preprocess=PREPROCESS))


def test_what_is_certain(store):
    images = Store(store).images
    assert certain(images["mini/a"]) == {"liver": True, "spleen": True}
    assert certain(images["mini/c"]) == {"liver": True, "spleen": False}
    assert certain(images["mini/c"], never=["prostate"])["prostate"] is False
    edit(store / "images.jsonl", lambda row: row.update(complete=False))
    assert certain(Store(store).images["mini/c"]) == {"liver": True}  # a contour that is missing says nothing


def test_asking_goes_on_where_it_was_stopped(store, looks, tmp_path):
    path = tmp_path / "answers.jsonl"
    first = ask_scans(MODEL, store, "train", Answers(path, ABOUT), progress=iter)
    assert looks == ["mini/a", "mini/c"]
    assert [(one.name, one.there) for one in first] == [
        ("liver", True), ("spleen", True), ("liver", True), ("spleen", False),
    ]  # fmt: skip
    path.write_bytes(path.read_bytes()[:-20])  # stopped while the second line was written
    again = ask_scans(MODEL, store, "train", Answers(path, ABOUT), progress=iter)
    assert looks == ["mini/a", "mini/c", "mini/c"] and again == first
    assert ask_scans(MODEL, store, "train", Answers(path, ABOUT), progress=iter, limit=1) == first[:2]
    assert len(looks) == 3


def test_answers_of_another_model_are_refused_or_begun_anew(tmp_path):
    path = tmp_path / "answers.jsonl"
    Answers(path, ABOUT).add("a", [Asked("p", "liver", True, signs_in("a", "liver"))])
    with pytest.raises(ValueError, match="another model"):
        Answers(path, {"weights_sha256": "0" * 64})
    assert Answers(path, ABOUT).lines["a"][0].name == "liver"
    assert not Answers(path, {"weights_sha256": "0" * 64}, anew=True).lines


def test_a_store_for_another_model_is_refused(store, tmp_path):
    other = SimpleNamespace(preprocess=dataclasses.replace(PREPROCESS, grid=(4, 4, 4)))
    with pytest.raises(ValueError, match="prepared differently"):
        ask_scans(SimpleNamespace(processor=other), store, "train", Answers(tmp_path / "a", ABOUT))


def test_a_fit_is_judged_by_structure():
    by_words = Presence(dict(zip(WEIGHED, (1.0, 0.0, 0.0, 0.0, 0.0), strict=True)), 0.0, ())
    asked = [
        Asked("p", "liver", True, signs_in("a", "liver")),
        Asked("p", "spleen", False, signs_in("mini/c", "spleen")),
        Asked("q", "spleen", False, signs_in("a", "spleen")),  # seen, where none is
    ]
    found = judge(by_words, asked)
    assert found["auc"]["value"] == 0.75 and found["not there, called not there"]["value"] == 0.5
    assert found["structures"]["spleen"] == {
        "there": 0, "of these called there": 0, "not there": 2, "of these called not there": 1,
    }  # fmt: skip
    facts = fit_to(asked, weights="f" * 64, stores=[Path("/somewhere/mini")], split="train").fitted
    assert (facts["there"], facts["not there"], facts["patients"], facts["stores"]) == (1, 2, 2, ["mini"])


# -- the command ------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A checkpoint by its files alone."""
    root = tmp_path / "rule"
    root.mkdir()
    for name in checkpoints.NEEDED:
        (root / name).write_text('{"model_type": "m3d"}')
    (root / "model.safetensors").write_bytes(b"weights")
    monkeypatch.setattr(m3d, "load", lambda *_, calibrated, **__: MODEL)  # which must not read an earlier fit
    return root


def test_the_command_fits_judges_and_keeps(store, folder, looks, tmp_path, capsys):
    edit(store / "images.jsonl", lambda row: row.update(split="validation"), image_id="mini/c")
    edit(store / "images.jsonl", lambda row: row.update(split="train"), image_id="mini/b")
    out = tmp_path / "out"
    words = ["calibrate", str(folder), "--data", str(store), "--never", "prostate", "--out", str(out), "--json"]
    assert main(words) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["fitted"]["there"], report["fitted"]["not there"]) == (4, 2)
    assert report["judged"]["mini"]["auc"]["value"] == 1.0
    kept = read_presence(folder)
    assert kept is not None and kept.fitted["weights_sha256"] == weights_sha256(folder)
    assert str(tmp_path) not in (folder / PRESENCE_NAME).read_text()
    assert kept.structures == ("liver", "prostate", "spleen")
    assert kept.probability("liver", signs_in("a", "liver")) > 0.5 > kept.probability("x", signs_in("a", "x"))
    assert {path.name for path in out.iterdir()} == {"answers.jsonl", "calibration.json", "reliability.png"}
    assert main(words) == 1 and "--force" in capsys.readouterr().err
    assert main([*words[:-1], "--force"]) == 0
    assert "auc" in capsys.readouterr().out and len(looks) == 3  # nothing was asked twice


def test_one_kind_alone_is_no_fit_and_keeps_nothing(store, folder, looks, tmp_path, capsys):
    edit(store / "images.jsonl", lambda row: row.update(complete=False))
    assert main(["calibrate", str(folder), "--data", str(store), "--out", str(tmp_path / "out")]) == 1
    assert "needs both" in capsys.readouterr().err
    assert not (folder / PRESENCE_NAME).exists()


def test_it_is_judged_on_other_scans(store, folder, capsys):
    assert main(["calibrate", str(folder), "--data", str(store), "--judge", "train"]) == 1
    assert "both 'train'" in capsys.readouterr().err


def test_a_head_alone_is_refused(store, folder, capsys):
    (folder / "config.json").write_text('{"model_type": "m3d_segvol"}')
    assert main(["calibrate", str(folder), "--data", str(store)]) == 1
    assert "no language model" in capsys.readouterr().err


def test_a_broken_fit_is_made_anew(store, folder, looks, tmp_path):
    (folder / PRESENCE_NAME).write_text("{}")
    words = ["calibrate", str(folder), "--data", str(store), "--never", "prostate", "--out", str(tmp_path / "out")]
    assert main([*words, "--force", "--judge", "validation"]) == 0
    assert read_presence(folder) is not None


def test_stores_of_the_same_name_and_ids_are_all_asked_and_judged(store, folder, looks, tmp_path, capsys):
    other = build(tmp_path / "other" / "mini")  # the same ids, of other patients
    edit(other / "images.jsonl", lambda row: row.update(patient_id="other " + row["patient_id"]))
    out = tmp_path / "out"
    words = ["calibrate", str(folder), "--data", str(store), str(other), "--never", "prostate", "--out", str(out)]
    assert main([*words, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert sorted(looks) == ["mini/a"] * 2 + ["mini/b"] * 2 + ["mini/c"] * 2
    assert (report["fitted"]["patients"], report["fitted"]["there"]) == (4, 3 + 4)
    assert list(report["judged"]) == ["mini (1)", "mini (2)"]
    assert not any(str(tmp_path) in path.read_text() for path in (out / "answers.jsonl", out / "calibration.json"))


def test_a_store_that_cannot_be_judged_does_not_cost_the_fit(store, folder, looks, tmp_path, capsys):
    edit(store / "images.jsonl", lambda row: row.update(complete=False), image_id="mini/b")
    save_labels(store, "mini/b", labels() * 0)
    out = tmp_path / "out"
    assert main(["calibrate", str(folder), "--data", str(store), "--out", str(out)]) == 0
    assert "nothing is certain" in capsys.readouterr().err
    assert read_presence(folder) is not None
    assert json.loads((out / "calibration.json").read_text())["judged"] == {}


def test_what_cannot_be_judged_is_refused_before_the_model_is_loaded(store, folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(m3d, "load", lambda *_, **__: pytest.fail("loaded"))
    words = ["calibrate", str(folder), "--out", str(tmp_path / "out"), "--data", str(store)]
    assert main([*words, "--judge", "test"]) == 1
    assert "no image is in split 'test'; it has train, validation" in capsys.readouterr().err
    assert main([*words, str(store)]) == 1
    assert "the same scans" in capsys.readouterr().err
    edit(store / "images.jsonl", lambda row: row.update(patient_id="patient-a"), image_id="mini/b")
    assert main(words) == 1
    assert "1 of its patients are in 'train' and in 'validation'" in capsys.readouterr().err
    assert not (tmp_path / "out" / "answers.jsonl").exists()
