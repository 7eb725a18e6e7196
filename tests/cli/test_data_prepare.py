"""`m3d data prepare`: what a config can get wrong is said in one line before anything is read."""

import json
from pathlib import Path

import pytest
import yaml

from m3d.cli.main import main

PREPROCESS = {"grid": [16, 16, 16], "spacing": [16, 16, 16], "intensity": {"kind": "window", "lo": -200, "hi": 400}}
PHANTOMS = {"kind": "phantoms", "seeds": {"train": [0, 2]}, "shape": [24, 24, 24], "spacing": [14, 14, 14]}
GOOD = {"output": "store", "preprocess": PREPROCESS, "derive": ["rec"], "sources": [PHANTOMS]}


@pytest.fixture
def prepare(tmp_path, monkeypatch, capsys):
    """Run the command with GOOD changed, in an empty folder: exit code, stdout, stderr."""
    monkeypatch.chdir(tmp_path)

    def call(change: dict | bytes, *words: str) -> tuple[int, str, str]:
        content = change if isinstance(change, bytes) else yaml.safe_dump({**GOOD, **change}).encode()
        Path("config.yaml").write_bytes(content)
        code = main(["data", "prepare", "config.yaml", "--workers", "0", *words])
        said = capsys.readouterr()
        return code, said.out, said.err

    return call


def test_a_store_its_summary_and_a_second_run(prepare):
    code, out, _ = prepare({})
    assert code == 0
    assert out.startswith("2 images in store: 2 prepared now, 0 were there, 0 rejected")
    assert "next: m3d data verify store" in out
    code, out, _ = prepare({}, "--json")
    assert code == 0
    assert {key: json.loads(out)[key] for key in ("images", "found", "prepared")} == {
        "images": 2,
        "found": 2,
        "prepared": 0,
    }


def test_list_reads_nothing(prepare):
    code, out, _ = prepare({}, "--list", "--json")
    assert code == 0
    assert json.loads(out)["sources"] == [
        {"dataset": "M3D head-and-neck phantom", "split": "train", "images": 2, "patients": 2}
    ]
    assert not Path("store").exists()


def test_overrides_may_stand_anywhere(prepare):
    assert prepare({}, "sources.0.seeds.train=[0,1]")[1].startswith("1 images")
    code, out, _ = prepare({}, "--out", "other", "sources.0.seeds.train=[0,1]")
    assert (code, out.startswith("1 images in other")) == (0, True)


BAD = {
    "no sources": ({"sources": []}, "the config has no sources"),
    "unknown key": ({"source": []}, "unknown key 'source'; did you mean 'sources'?"),
    "unknown kind": ({"sources": [{"kind": "phantom"}]}, "unknown source kind 'phantom'; did you mean 'phantoms'?"),
    "unknown option": ({"sources": [{**PHANTOMS, "seed": 1}]}, "unknown option 'seed'; did you mean 'seeds'?"),
    "option of another type": ({"sources": [{**PHANTOMS, "seeds": 20}]}, "source phantoms: seeds: "),
    "nothing of a source's derive": ({"sources": [{**PHANTOMS, "derive": None}]}, "derive: None is no list"),
    "a word for derive": ({"sources": [{**PHANTOMS, "derive": "rec"}]}, "derive: 'rec' is no list"),
    "unknown truth": ({"sources": [{**PHANTOMS, "derive": ["rek"]}]}, "rek cannot be derived"),
    "unknown kept": ({"kept": "int8"}, "kept='int8' is none of uint8, uint16, float32"),
    "intensity that is a number": ({"preprocess": {**PREPROCESS, "intensity": 5}}, "intensity: 5 is no group"),
    "crop that is a number": ({"preprocess": {**PREPROCESS, "crop": 5}}, "crop: 5 is no group"),
    "spacing in words": ({"preprocess": {**PREPROCESS, "spacing": "abc"}}, "spacing: 'abc' is no list"),
    "no grid": ({"preprocess": {}}, "preprocess needs the key 'grid'"),
    "no YAML": (b"\xff\xfe\x00", "config.yaml is not YAML"),
    "no output": ({"output": None}, "has no output; add one, or --out DIR"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_config_is_told_in_one_line_and_nothing_is_written(prepare, name):
    change, says = BAD[name]
    code, _, err = prepare(change)
    assert code == 1
    assert says in err
    assert err.count("\n") == 1
    assert not Path("store").exists()


def test_a_first_look_does_not_shrink_a_store(prepare):
    prepare({})
    code, _, err = prepare({}, "--limit", "1")
    assert code == 1
    assert "store holds 2 images, --limit lists 1; choose another --out" in err
    assert prepare({}, "--limit", "1", "--out", "look")[0] == 0


@pytest.mark.parametrize("words", [("--limit", "0"), ("--limit", "-1"), ("--workers", "-2")])
def test_numbers_below_their_least_are_refused(prepare, words):
    with pytest.raises(SystemExit) as stop:
        prepare({}, *words)
    assert stop.value.code == 2


def test_a_reject_is_told_and_fails(prepare):
    Path("scans").mkdir()
    Path("scans/broken.nii.gz").write_bytes(b"nothing")
    folder = {"kind": "folder", "root": "scans"}
    code, out, err = prepare({"sources": [PHANTOMS, folder]})
    assert code == 1
    assert "2 prepared now, 0 were there, 1 rejected" in out
    assert "store/rejects.jsonl" in err
