"""A conversion is whole or not there, goes on where it was stopped, and never runs or trusts what it reads."""

import errno
import hashlib
import json
import os
import pickle
import shutil
from collections import namedtuple
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from data_prep.preprocess import Preprocess
from m3d.convert import shards
from m3d.convert.run import convert, examine
from m3d.convert.source import open_source
from tests.fixtures import released
from tests.fixtures.released import SMALL

LARGEST = 300_000


def digest(path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def stopped_after(monkeypatch, number: int) -> None:
    """Let a conversion die when it begins its next file."""
    written, write = [], shards._write

    def dying(plan, path, published) -> None:
        if len(written) == number:
            raise KeyboardInterrupt
        written.append(path)
        write(plan, path, published)

    monkeypatch.setattr(shards, "_write", dying)


def test_a_run_that_was_stopped_goes_on_from_its_last_whole_file(tmp_path, monkeypatch):
    theirs, ours = released.lamed(tmp_path / "theirs"), tmp_path / "ours"
    with monkeypatch.context() as patched:
        stopped_after(patched, 2)
        with pytest.raises(KeyboardInterrupt):
            convert(theirs, ours, SMALL, largest_shard=LARGEST)
    room = shards.room_for(ours)
    assert not ours.exists()
    finished = {path.name: path.stat().st_mtime_ns for path in room.glob("*.safetensors")}
    assert len(finished) == 2

    said: list[str] = []
    done = convert(theirs, ours, SMALL, largest_shard=LARGEST, say=said.append)
    assert sum("was finished before" in line for line in said) == 2
    assert {name: (ours / name).stat().st_mtime_ns for name in finished} == finished
    straight = convert(theirs, tmp_path / "straight", SMALL, largest_shard=LARGEST)
    assert done.manifest["files"] == straight.manifest["files"]
    assert not room.exists()
    assert not list(ours.glob("*.part")) + list(ours.glob("journal*"))


def test_a_finished_file_that_was_damaged_meanwhile_is_written_again(tmp_path, monkeypatch):
    theirs, ours = released.lamed(tmp_path / "theirs"), tmp_path / "ours"
    with monkeypatch.context() as patched:
        stopped_after(patched, 2)
        with pytest.raises(KeyboardInterrupt):
            convert(theirs, ours, SMALL, largest_shard=LARGEST)
    victim = min(shards.room_for(ours).glob("*.safetensors"))
    victim.write_bytes(victim.read_bytes()[:-1] + b"\xff")
    done = convert(theirs, ours, SMALL, largest_shard=LARGEST)
    assert digest(ours / victim.name) == done.manifest["files"][victim.name]
    assert load_file(ours / victim.name)


def test_what_was_begun_otherwise_is_not_mixed_in(tmp_path, monkeypatch):
    theirs, ours = released.lamed(tmp_path / "theirs"), tmp_path / "ours"
    with monkeypatch.context() as patched:
        stopped_after(patched, 2)
        with pytest.raises(KeyboardInterrupt):
            convert(theirs, ours, SMALL, largest_shard=LARGEST)
    done = convert(theirs, ours, replace(SMALL, dtype=torch.bfloat16), largest_shard=LARGEST)
    assert {one.dtype for file in done.manifest["files"] for one in load_file(ours / file).values()} == {torch.bfloat16}
    index = json.loads((ours / "model.safetensors.index.json").read_text())
    assert (
        set(index["weight_map"].values()) == set(done.manifest["files"]) == {p.name for p in ours.glob("*.safetensors")}
    )


def test_another_checkpoint_of_the_same_name_size_and_time_is_not_mixed_in(tmp_path, monkeypatch):
    (tmp_path / "a").mkdir()
    first, second = released.lamed(tmp_path / "a" / "theirs"), tmp_path / "b" / "theirs"
    shutil.copytree(first, second)
    for path in second.glob("*.safetensors"):
        own = path.stat()
        state = {name: tensor + 1 for name, tensor in load_file(path).items()}
        save_file(state, path, metadata={"format": "pt"})
        os.utime(path, ns=(own.st_atime_ns, own.st_mtime_ns))
    ours = tmp_path / "ours"
    with monkeypatch.context() as patched:
        stopped_after(patched, 2)
        with pytest.raises(KeyboardInterrupt):
            convert(first, ours, SMALL, largest_shard=LARGEST)
    convert(second, ours, SMALL, largest_shard=LARGEST)
    convert(second, tmp_path / "whole", SMALL, largest_shard=LARGEST)
    for path in ours.glob("*.safetensors"):
        assert path.read_bytes() == (tmp_path / "whole" / path.name).read_bytes()


def test_the_manifest_has_the_hash_of_every_file_read_and_written(tmp_path):
    theirs = released.lamed(tmp_path / "theirs")
    done = convert(theirs, tmp_path / "ours", SMALL, largest_shard=LARGEST, origin={"revision": "abc"})
    manifest = json.loads((done.folder / "manifest.json").read_text())
    assert manifest == done.manifest
    assert {name: digest(done.folder / name) for name in manifest["files"]} == manifest["files"]
    read = {path.name: digest(path) for path in theirs.glob("*.safetensors")}
    assert {name: facts["sha256"] for name, facts in manifest["source"]["files"].items()} == read
    assert (manifest["source"]["name"], manifest["source"]["revision"]) == ("theirs", "abc")
    assert str(tmp_path) not in json.dumps(manifest)
    assert manifest["parameters"] == sum(
        one.numel() for file in manifest["files"] for one in load_file(done.folder / file).values()
    )


def test_a_full_disk_is_told_before_and_while_writing(tmp_path, monkeypatch):
    theirs, ours = released.lamed(tmp_path / "theirs"), tmp_path / "ours"
    usage = namedtuple("usage", "total used free")
    with monkeypatch.context() as patched:
        patched.setattr(shards.shutil, "disk_usage", lambda path: usage(10, 5, 5))
        with pytest.raises(OSError, match=r"bytes of disk, 5 are free; make room") as caught:
            convert(theirs, ours, SMALL)
        assert caught.value.errno == errno.ENOSPC
    assert sorted(path.name for path in tmp_path.iterdir()) == ["theirs"]

    calls, save = [], shards.save_file

    def filling(state, path, **more) -> None:
        calls.append(path)
        if len(calls) == 3:
            path.write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        save(state, path, **more)

    with monkeypatch.context() as patched:
        patched.setattr(shards, "save_file", filling)
        with pytest.raises(OSError, match=r"No space left on device.*run it again to go on from the last file"):
            convert(theirs, ours, SMALL, largest_shard=LARGEST)
    assert not ours.exists()
    room = shards.room_for(ours)
    assert len(list(room.glob("*.safetensors"))) == 2
    assert not list(room.glob("*.part"))
    assert convert(theirs, ours, SMALL, largest_shard=LARGEST).folder == ours


def test_only_a_checkpoint_is_replaced_and_only_when_asked(tmp_path):
    theirs, ours = released.lamed(tmp_path / "theirs"), tmp_path / "ours"
    convert(theirs, ours, SMALL)
    with pytest.raises(FileExistsError, match="use --force to replace it"):
        convert(theirs, ours, SMALL)
    assert convert(theirs, ours, SMALL, force=True).folder == ours
    diary = tmp_path / "diary"
    diary.mkdir()
    (diary / "monday.txt").write_text("dear diary")
    with pytest.raises(ValueError, match="is no earlier conversion"):
        convert(theirs, diary, SMALL, force=True)
    assert (diary / "monday.txt").read_text() == "dear diary"
    (ours / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"1 files that no conversion wrote, such as notes\.txt"):
        convert(theirs, ours, SMALL, force=True)
    assert (ours / "notes.txt").read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["diary", "ours", "theirs"]


class Bomb:
    """What a pickle from a stranger could hold."""

    def __reduce__(self) -> tuple:
        return (exec, ("raise SystemExit('the pickle ran code')",))


def test_a_pickle_that_would_run_code_is_refused(tmp_path):
    torch.save({"patch_embedding.position_embeddings": torch.zeros(1), "bomb": Bomb()}, tmp_path / "evil.bin")
    (tmp_path / "old.bin").write_bytes(pickle.dumps(Bomb()))
    for name in ("evil.bin", "old.bin"):
        with pytest.raises(ValueError, match="holds more than tensors, or is cut; pickles that could run code"):
            open_source(tmp_path / name)


def test_torchs_old_format_is_read_too(tmp_path):
    _, weights, *_ = released.read("segvol_a")
    torch.save(weights, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    source = open_source(tmp_path / "old.pth")
    read = dict(source.read(list(weights)))
    assert all(torch.equal(read[name], one) for name, one in weights.items())


def test_files_that_are_cut_missing_or_doubled_are_named(tmp_path):
    folder = released.lamed(tmp_path / "theirs")
    last = max(folder.glob("*.safetensors"))
    whole = last.read_bytes()
    last.write_bytes(whole[:-100])
    with pytest.raises(ValueError, match=rf"{last.name} cannot be read .*was the download cut"):
        examine(folder, SMALL)
    last.unlink()
    with pytest.raises(FileNotFoundError, match=rf"1 of 3 weight files are missing: {last.name}; download them"):
        examine(folder, SMALL)
    with pytest.raises(FileNotFoundError, match="no weights"):
        open_source(released.FIXTURES / "keys")
    with pytest.raises(FileNotFoundError, match="there is no such file or folder"):
        open_source(tmp_path / "nowhere")
    two = tmp_path / "two"
    two.mkdir()
    for name in ("one.bin", "other.bin"):
        torch.save({"a": torch.zeros(1)}, two / name)
    with pytest.raises(ValueError, match=r"has one\.bin, other\.bin and no index; name the file itself"):
        open_source(two)
    index = {"weight_map": {"a": "one.bin", "b": "other.bin"}}
    (two / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"a is in one\.bin too"):
        open_source(two)


def test_a_weight_that_is_not_finite_is_refused(tmp_path):
    _, weights, *_ = released.read("lamed_a")
    weights["model.norm.weight"][3] = float("nan")
    with pytest.raises(ValueError, match=r"language_model\.model\.norm\.weight holds NaN or infinity"):
        convert(released.lamed(tmp_path / "theirs", weights=weights), tmp_path / "ours", SMALL)
    assert [path.name for path in tmp_path.iterdir()] == ["theirs"]


def test_an_overflow_of_float16_is_refused(tmp_path):
    _, weights, *_ = released.read("lamed_a")
    weights["model.norm.weight"][3] = 1e6
    folder = released.lamed(tmp_path / "theirs", weights=weights)
    with pytest.raises(ValueError, match="through --dtype; take bfloat16"):
        convert(folder, tmp_path / "ours", replace(SMALL, dtype=torch.float16))
    assert convert(folder, tmp_path / "ours", replace(SMALL, dtype=torch.bfloat16)).loaded


def test_scans_of_m3d_data_pass_as_they_are(tmp_path):
    done = convert(released.clip(tmp_path / "theirs"), tmp_path / "ours", replace(SMALL, preparation="m3d-data"))
    assert Preprocess.read(done.folder) == Preprocess(grid=(8, 48, 32), orientation=None)
