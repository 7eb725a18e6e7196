"""`m3d export` from the command line: what it writes, what it shows, and what it refuses in one line."""

import json
from pathlib import Path

import pytest

import m3d
from m3d.cli import main
from m3d.export import hub


def call(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    code = main([str(word) for word in words])
    said = capsys.readouterr()
    return code, said.out, said.err


def test_a_folder_for_the_hub_loads_back(capsys, tmp_path: Path):
    code, said, _ = call(capsys, "export", "m3d-tiny", tmp_path / "share", "--format", "hub", "--json")
    told = json.loads(said)
    assert code == 0 and told["folder"] == str(tmp_path / "share") and "README.md" in told["files"]
    assert m3d.load(tmp_path / "share", device="cpu").id == "share"
    code, _, error = call(capsys, "export", "m3d-tiny", tmp_path / "share", "--format", "hub")
    assert code == 1 and "share exists; use --force to replace it" in error


def test_a_dry_run_shows_files_and_card_and_pushes_nothing(capsys, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(hub, "push_to_hub", lambda *_, **__: pytest.fail("pushed"))
    words = ("export", "m3d-tiny", "--format", "hub", "--repo", "jane/m3d-tiny", "--dry-run")
    code, said, _ = call(capsys, *words)
    assert code == 0 and "model.safetensors" in said and "pipeline_tag: image-text-to-text" in said
    code, said, _ = call(capsys, *words, "--json")
    assert json.loads(said)["repo"] == "jane/m3d-tiny" and "Not for clinical use" in json.loads(said)["card"]


def test_a_push_gets_what_was_asked_for(capsys, monkeypatch):
    asked = []
    monkeypatch.setattr(hub, "push_to_hub", lambda upload, repo, **more: asked.append((upload.source.name, repo, more)))
    words = ("--repo", "jane/m3d-tiny", "--private", "--revision", "v1")
    assert call(capsys, "export", "m3d-tiny", "--format", "hub", *words)[0] == 0
    assert asked == [("m3d-tiny", "jane/m3d-tiny", {"private": True, "revision": "v1"})]
    code, _, error = call(capsys, "export", "m3d-tiny", "--format", "hub", "--repo", "tiny")
    assert code == 1 and "'tiny' is no user/name" in error and len(asked) == 1


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (("m3d-tiny", "x", "--format", "lamed"), "the released LaMed code cannot read this model: box_head=true"),
        (("m3d-tiny", "x", "--format", "segvol"), "seg_config.encoder_config=null"),
        (("m3d-tiny", "x", "--format", "peft"), "m3d-tiny has no LoRA adapters"),
        (("nowhere", "x", "--format", "peft"), "nowhere: no checkpoint here"),
        (("m3d-tiny", "x", "--format", "monai-bundle", "--structures", "liver,liver"), "names one twice"),
    ],
)
def test_refusals_are_one_line_and_write_nothing(capsys, tmp_path: Path, monkeypatch, words, why):
    monkeypatch.chdir(tmp_path)
    code, _, error = call(capsys, "export", *words)
    assert code == 1 and why in error and len(error.splitlines()) == 1
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (("m3d-tiny", "--format", "lamed"), "name the folder to write"),
        (("m3d-tiny", "--format", "hub"), "say where to"),
        (("m3d-tiny", "x", "--format", "peft", "--repo", "a/b"), "--repo is for --format hub"),
        (("m3d-tiny", "x", "--format", "peft", "--structures", "a"), "--structures is for --format monai-bundle"),
    ],
)
def test_what_does_not_go_together_is_told_with_the_usage(capsys, words, why):
    with pytest.raises(SystemExit) as stop:
        main(["export", *words])
    assert stop.value.code == 2 and why in capsys.readouterr().err
