"""M3D: talk to a 3D medical scan. A CT goes in; report, answers, boxes and masks come out, in the scan's own geometry.

    import m3d

    model = m3d.load("m3d-tiny")
    scan = model.look("ct.nii.gz")
    print(scan.report().text)
    scan.segment("mandible").save("out")

Nothing heavy is imported until a name is used.
"""

import importlib
import importlib.util
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from m3d import torchvision_remedy

if TYPE_CHECKING:
    from data_prep.boxes import Box
    from data_prep.preprocess import Preprocess
    from data_prep.records import RecordFile, read_records
    from data_prep.store import Store
    from data_prep.volume import BadScan, Volume
    from m3d.export.hub import push_to_hub
    from m3d.inference.label_map import write_label_map
    from m3d.inference.load import M3D, load
    from m3d.inference.postprocess import PostProcess
    from m3d.inference.results import Result
    from m3d.inference.scan import NoMask, Scan
    from m3d.inference.session import Session
    from m3d.models import M3DConfig, M3DForConditionalGeneration, M3DProcessor

_WHERE = {
    "load": "m3d.inference.load",
    "push_to_hub": "m3d.export.hub",
    "M3D": "m3d.inference.load",
    "Scan": "m3d.inference.scan",
    "NoMask": "m3d.inference.scan",
    "Session": "m3d.inference.session",
    "Result": "m3d.inference.results",
    "PostProcess": "m3d.inference.postprocess",
    "write_label_map": "m3d.inference.label_map",
    "Volume": "data_prep.volume",
    "BadScan": "data_prep.volume",
    "Box": "data_prep.boxes",
    "Preprocess": "data_prep.preprocess",
    "Store": "data_prep.store",
    "RecordFile": "data_prep.records",
    "read_records": "data_prep.records",
    "M3DConfig": "m3d.models",
    "M3DForConditionalGeneration": "m3d.models",
    "M3DProcessor": "m3d.models",
}

__all__ = [
    "M3D",
    "BadScan",
    "Box",
    "M3DConfig",
    "M3DForConditionalGeneration",
    "M3DProcessor",
    "NoMask",
    "PostProcess",
    "Preprocess",
    "RecordFile",
    "Result",
    "Scan",
    "Session",
    "Store",
    "Volume",
    "load",
    "push_to_hub",
    "read_records",
    "write_label_map",
]

try:
    __version__ = version("m3d-lamed")
except PackageNotFoundError:  # a checkout that was never installed
    __version__ = "0+unknown"


def _check_siblings() -> None:
    """PyPI has other projects named `m3d` and `encoders`; ours come from one place or not at all."""
    home = Path(__file__).resolve().parent.parent
    for name in ("encoders", "segvol_head", "data_prep"):
        spec = importlib.util.find_spec(name)
        place = Path(spec.origin).resolve().parent.parent if spec is not None and spec.origin else None
        if place != home:
            raise ImportError(
                f"package {name!r} should lie in {home}, but {'is missing' if place is None else f'lies in {place}'}: "
                "another project of that name hides ours; uninstall it, then pip install --force-reinstall m3d-lamed"
            )


def __getattr__(name: str) -> Any:  # noqa: ANN401
    if name not in _WHERE:
        raise AttributeError(f"module 'm3d' has no attribute {name!r}")
    return getattr(importlib.import_module(_WHERE[name]), name)


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])


_check_siblings()
torchvision_remedy.install()
