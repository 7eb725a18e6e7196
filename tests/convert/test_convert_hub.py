"""Released models by their names on the hub, against a stand-in that speaks its protocol on this machine."""

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from safetensors.torch import load_file

from m3d.cli.main import main
from m3d.convert.hub import RELEASES, fetch, placed, release_of
from m3d.inference.checkpoints import resolve
from tests.fixtures import released

REPO = "GoodBaiBai88/M3D-LaMed-Llama-2-7B"
HOME = Path(__file__).parents[2]


class Hub(ThreadingHTTPServer):
    """One repository of files at one commit; remembers what was asked for."""

    folder: Path
    commit: str
    asked: list[str]


class Answers(BaseHTTPRequestHandler):
    """The part of the hub's API that a download needs."""

    server: Hub

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, *, body: bool) -> None:
        hub, path = self.server, self.path.partition("?")[0]
        hub.asked.append(path)
        files = sorted(one.name for one in hub.folder.iterdir())
        if path == f"/api/models/{REPO}/revision/{hub.commit}":
            siblings = [{"rfilename": name} for name in files]
            self.give(json.dumps({"id": REPO, "sha": hub.commit, "siblings": siblings}).encode(), body=body)
        elif path == f"/api/models/{REPO}/tree/{hub.commit}":
            rows = [
                {"type": "file", "path": name, "size": (hub.folder / name).stat().st_size, "oid": "0" * 40}
                for name in files
            ]
            self.give(json.dumps(rows).encode(), body=body)
        elif path.startswith(f"/{REPO}/resolve/{hub.commit}/") and path.rpartition("/")[2] in files:
            self.give((hub.folder / path.rpartition("/")[2]).read_bytes(), body=body)
        else:
            self.send_response(404)
            self.send_header("X-Error-Code", "RevisionNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()

    def give(self, content: bytes, *, body: bool) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        self.send_header("X-Repo-Commit", self.server.commit)
        self.end_headers()
        if body:
            self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        """Be quiet."""


@pytest.fixture
def hub(tmp_path) -> Iterator[Hub]:
    server = Hub(("127.0.0.1", 0), Answers)
    server.folder, server.commit, server.asked = tmp_path / "published", RELEASES[REPO].revision, []
    wide(server.folder)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def wide(folder: Path) -> None:
    """The released layout, towers of 64-wide heads as published: nothing has to be told on a command line."""
    import torch
    from transformers import LlamaConfig

    from m3d.convert.lamed import LANGUAGE
    from m3d.models import M3DConfig, M3DForConditionalGeneration, M3DSegConfig, M3DVisionConfig
    from m3d.models.published import new_name

    torch.manual_seed(0)
    config, theirs, *_ = released.read("lamed_a")
    sizes = {"image_size": [8, 48, 32], "patch_size": [2, 8, 4], "hidden_size": 64, "num_attention_heads": 1}
    tower = M3DVisionConfig(**sizes, intermediate_size=64, num_hidden_layers=1)
    encoder = M3DVisionConfig(**sizes, intermediate_size=64, num_hidden_layers=1, cls_token=False)
    known = LlamaConfig().to_dict()
    text = LlamaConfig(**{name: one for name, one in config["llama"].items() if name in known})
    seg = M3DSegConfig(encoder_config=encoder, decoder_mlp_dim=64, iou_hidden_size=32)
    model = M3DForConditionalGeneration(
        M3DConfig(vision_config=tower, text_config=text, seg_config=seg, image_token_id=596, seg_token_id=599)
    )
    ours = {name: one.contiguous() for name, one in model.state_dict().items()}
    names = {new_name(name): name for name in theirs}
    state = {names[name]: one for name, one in ours.items() if name in names}
    assert len(state) > 60
    assert any(name.startswith(LANGUAGE) for name in ours)
    released.lamed(folder, weights=state, shards=6)


def run(code: str, tmp_path: Path, **more: str) -> subprocess.CompletedProcess:
    keep = {name: one for name, one in os.environ.items() if not name.startswith("HF_")}
    homes = {"HF_HOME": str(tmp_path / "hf"), "XDG_CACHE_HOME": str(tmp_path / "cache"), "PYTHONPATH": str(HOME)}
    return subprocess.run(
        [sys.executable, "-c", code], env=keep | homes | more, cwd=tmp_path, capture_output=True, text=True, check=False
    )


LOAD = f"""
import m3d
model = m3d.load({REPO!r}, device="cpu")
print(model.id, model.model.config.seg_token_id, next(model.model.parameters()).dtype)
"""


@pytest.mark.slow
def test_a_released_model_is_fetched_once_at_its_pinned_commit_and_converted_once(hub, tmp_path):
    endpoint = f"http://127.0.0.1:{hub.server_port}"
    done = run(LOAD, tmp_path, HF_ENDPOINT=endpoint)
    assert done.returncode == 0, done.stderr
    slug = RELEASES[REPO].slug
    assert done.stdout.split() == [slug, "599", "torch.float32"]
    assert not [path for path in hub.asked if path.endswith(".py")]
    assert sum(path.endswith("-of-00006.safetensors") for path in set(hub.asked)) == 6

    ours = tmp_path / "cache" / "m3d" / "converted" / slug
    manifest = json.loads((ours / "manifest.json").read_text())
    assert (manifest["source"]["repo"], manifest["source"]["revision"]) == (REPO, hub.commit)
    assert manifest["dtype"] == "bfloat16"
    assert {str(one.dtype) for one in load_file(ours / "model.safetensors").values()} == {"torch.bfloat16"}

    hub.asked.clear()
    again = run(LOAD, tmp_path, HF_HUB_OFFLINE="1", HF_ENDPOINT=endpoint)  # all is there: no network is needed
    assert again.returncode == 0, again.stderr
    assert hub.asked == []


@pytest.fixture
def here(hub, tmp_path, monkeypatch) -> Path:
    """This process, with a cache of its own and the stand-in for the hub."""
    endpoint = f"http://127.0.0.1:{hub.server_port}"
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", endpoint)
    template = f"{endpoint}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hf"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_offline_it_says_which_files_to_place_where_and_takes_them_from_there(hub, here, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    release = RELEASES[REPO]
    folder = here / "cache" / "m3d" / "released" / release.slug
    with pytest.raises(FileNotFoundError) as caught:
        resolve(REPO)
    told = str(caught.value)
    files = [name for name in release.files if "-of-" not in name]
    files += ["model-0000{1..6}-of-00006.safetensors"]  # as a shell writes the six
    for said in [*files, str(folder), release.revision[:12], f"m3d convert {REPO} FOLDER", "HF_HUB_OFFLINE is set"]:
        assert said in told
    folder.mkdir(parents=True)
    for name in release.files:
        if (hub.folder / name).is_file():
            (folder / name).write_bytes((hub.folder / name).read_bytes())
        elif name.endswith(".json"):  # this stand-in's words are all in a tokenizer.json
            (folder / name).write_text("{}")
    (folder / "tokenizer.json").write_bytes((hub.folder / "tokenizer.json").read_bytes())
    (folder / "tokenizer.model").write_bytes(b"not read where there is a tokenizer.json")
    ours = resolve(REPO)
    assert ours == here / "cache" / "m3d" / "converted" / release.slug
    assert (ours / "manifest.json").is_file()
    assert hub.asked == []


def test_the_command_goes_online_although_the_others_do_not(hub, here, monkeypatch, capsys):
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    assert main(["convert", REPO, "ours", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["kind"], said["dtype"], said["keys"]["missing"]) == ("lamed", "float32", [])
    assert (here / "ours" / "manifest.json").is_file()
    assert hub.asked
    assert "HF_HUB_OFFLINE" not in os.environ  # which `main` had set before


def test_names_of_repositories_and_of_folders_are_told_apart(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert release_of("runs/mine") is None
    assert release_of(tmp_path / "absolute") is None
    assert release_of(REPO) == RELEASES[REPO]
    pinned = release_of(f"jane/m3d-mine@{'a' * 40}")
    assert (pinned.repo, pinned.revision) == ("jane/m3d-mine", "a" * 40)
    (tmp_path / "GoodBaiBai88" / "M3D-CLIP").mkdir(parents=True)
    assert release_of("GoodBaiBai88/M3D-CLIP") is None  # a folder of that name comes first
    with pytest.raises(FileNotFoundError, match="neither a checkpoint folder nor bundled"):
        resolve("runs/mine")


def test_every_release_is_pinned_to_a_whole_commit():
    for release in RELEASES.values():
        assert len(release.revision) == 40
        assert not [name for name in release.files if name.endswith(".py")]


def test_placed_files_are_used_before_anything_is_asked_of_the_hub(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    release = RELEASES["GoodBaiBai88/M3D-CLIP"]
    placed(release).mkdir(parents=True)
    for name in release.files:
        (placed(release) / name).touch()
    assert fetch(release) == placed(release)
