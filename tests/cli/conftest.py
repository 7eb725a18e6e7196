"""The command line with a model that needs no weights: it prepares scans for real and answers by rule."""

import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

import m3d
from data_prep.boxes import Box, box_of_mask, to_mm
from data_prep.preprocess import Foreground, Preprocess, Window
from data_prep.volume import Volume
from m3d.cli import main
from m3d.inference import checkpoints, overlay
from m3d.inference.postprocess import PostProcess
from m3d.inference.prompting import place_box, place_points
from m3d.inference.results import FoundBox, FoundMask, NotDrawn, Result
from m3d.inference.scan import NoMask

PREPROCESS = Preprocess(grid=(8, 16, 16), intensity=Window(-200, 400), crop=Foreground(-400), spacing=(4.0, 4.0, 4.0))


@dataclass(frozen=True, eq=False)
class FakeScan:
    """Finds whatever is brighter than 200; knows no ghosts."""

    volume: Volume
    calls: list[tuple[str, Any]]
    path: Path | None = None
    warnings: tuple[str, ...] = ("a warning of preparation",)
    model_id: str = "m3d-fake"

    def _result(self, task: str, prompt: str, text: str, boxes: Any = (), masks: Any = ()) -> Result:
        return Result(
            task=task, prompt=prompt, text=text, boxes=boxes, masks=masks, volume=self.volume, scan_path=self.path,
            model_id=self.model_id, preprocess=PREPROCESS.to_dict(), warnings=self.warnings, seconds=0.5,
        )  # fmt: skip

    def ask(self, question: str, **options: Any) -> Result:
        self.calls.append(("ask", (question, options)))
        return self._result("ask", question, "It is large.\x1b[31m")

    def report(self) -> Result:
        return self._result("report", "Report.", "A scan of a test.")

    def locate(self, name: str) -> Result:
        if name == "ghost":
            return self._result("locate", name, "There is no ghost.")
        voxel = box_of_mask(self.volume.array > 200, name)
        return self._result("locate", name, "Here.", boxes=(FoundBox(name, voxel, to_mm(voxel, self.volume.affine)),))

    def segment(
        self,
        name: str | list[str] | None = None,
        *,
        points: Any = None,
        box: Box | None = None,
        frame: Any = "voxel",
        postprocess: PostProcess | None = None,
        zoom: Any = False,
    ) -> Result:
        if zoom is not False:
            self.calls.append(("zoom", zoom))
        placed = [(place_points([at], self.volume, frame=frame)[0], label) for at, label in points or []] or None
        self.calls.append(("segment", (name, placed, None if box is None else place_box(box, self.volume))))
        cleaning = postprocess or PostProcess()
        if isinstance(name, list):
            answers = [self._drawn(one) for one in name if one != "ghost"]
            refused = tuple(NotDrawn(one, "the model answered 'No.' without [SEG]") for one in name if one == "ghost")
            masks = tuple(mask for answer in answers for mask in answer.masks)
            both = self._result("segment", "", "It is [SEG].", masks=masks)
            return dataclasses.replace(both, asked=tuple(name), not_drawn=refused).postprocessed(cleaning)
        if name == "ghost":
            raise NoMask("no mask of 'ghost': the model answered 'There is no ghost.' without [SEG]")
        return self._drawn(name).postprocessed(cleaning)

    def segment_all(self, *, postprocess: PostProcess | None = None, zoom: Any = False) -> Result:
        return self.segment(["mandible", "ghost", "nothing"], postprocess=postprocess, zoom=zoom)

    def _drawn(self, name: str | None) -> Result:
        mask = self.volume.array > (1e9 if name == "nothing" else 200)
        found = FoundMask(
            "larynx" if name == "impostor" else name or "prompted", mask, 0.9, float(mask.sum() * self.volume.voxel_ml)
        )
        return self._result("segment", name or "", "It is [SEG].", masks=(found,))


@dataclass
class FakeModel:
    """What `m3d.load` gives; remembers how it was called and what was asked."""

    loads: list[tuple[Any, Any]] = field(default_factory=list)
    calls: list[tuple[str, Any]] = field(default_factory=list)

    def look(self, volume: Volume) -> FakeScan:
        PREPROCESS.apply(volume)
        return FakeScan(volume, self.calls)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> FakeModel:
    model = FakeModel()
    folder = tmp_path_factory.mktemp("models") / "m3d-fake"
    folder.mkdir()
    (folder / "preprocess.json").write_text(json.dumps(PREPROCESS.to_dict()))

    def load(name: str, *, device: str = "auto", dtype: object = None, quantize: object = None) -> FakeModel:
        model.loads.append((name, device))
        return model

    monkeypatch.setattr(m3d, "load", load)
    monkeypatch.setattr(checkpoints, "resolve", lambda name: folder)
    return model


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Every command runs in an empty folder, with no data and a cache of its own; pictures are small and quick."""
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    monkeypatch.delenv("M3D_DATA", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(overlay, "DPI", 40)
    return here


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """The real `main`: exit code, stdout, stderr."""

    def call(*words: object) -> tuple[int, str, str]:
        code = main([str(word) for word in words])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


def head() -> Volume:
    """A body in air with a bright block, in axes P, L, I and voxels that are no cubes."""
    array = np.full((20, 24, 16), -1000.0, np.float32)
    array[2:18, 2:22, 1:15] = np.random.default_rng(0).normal(40, 5, (16, 20, 14))
    array[4:9, 12:18, 3:8] = 300.0
    affine = np.array([[0, -3.0, 0, 36], [-3.0, 0, 0, 30], [0, 0, -5.0, 40], [0, 0, 0, 1]])
    return Volume(array, affine)


@pytest.fixture
def ct(tmp_path: Path) -> Path:
    """A good scan on disk."""
    path = tmp_path / "scans" / "ct.nii.gz"
    path.parent.mkdir()
    volume = head()
    nib.save(nib.Nifti1Image(volume.array, volume.affine), path)
    return path
