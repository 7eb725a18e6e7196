"""Let a CPU build of torch live beside PyPI's torchvision, whose C++ operators then cannot load.

When imported, torchvision registers fake kernels for ``torchvision::nms`` and ``torchvision::qnms``; without these
operators it fails, and with it transformers, peft, timm and open_clip. Defining the two schemas is enough.
An import hook does so when torchvision is first imported, whoever asks for it, so that ``import m3d`` needs no torch.
"""

import importlib
import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Literal

State = Literal["absent", "native", "remedied", "broken"]

SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)

_libraries: list[object] = []  # a torch Library takes its operators with it when it is collected


class TorchvisionHook(MetaPathFinder):
    """Apply the remedy once torchvision begins to import its own modules, then step aside.

    Not at ``torchvision`` itself: libraries look for its spec only to learn whether it is installed.
    """

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Never finds anything; the ordinary finders do."""
        if fullname.startswith("torchvision."):
            if self in sys.meta_path:
                sys.meta_path.remove(self)
            apply()
        return None


def install() -> None:
    """Put the hook in place, once, where torchvision is not yet imported."""
    if "torchvision" not in sys.modules and not any(isinstance(hook, TorchvisionHook) for hook in sys.meta_path):
        sys.meta_path.insert(0, TorchvisionHook())


def apply() -> Literal["absent", "native", "remedied"]:
    """Define the missing schemas if torchvision is installed and its own operators cannot load."""
    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None:
        return "absent"
    import torch

    if hasattr(torch.ops.torchvision, "nms"):
        return "remedied" if _libraries else "native"
    if _loads(Path(spec.origin).parent):
        return "native"
    library = torch.library.Library("torchvision", "DEF")
    for schema in SCHEMAS:
        library.define(schema)
    _libraries.append(library)
    return "remedied"


def state() -> State:
    """What is the matter with torchvision here, found out by importing it: for `m3d doctor`."""
    try:
        found = apply()
        if found != "absent":
            importlib.import_module("torchvision")
    except (ImportError, OSError, RuntimeError):
        return "broken"
    return found


def _loads(folder: Path) -> bool:
    import torch

    for binary in (*folder.glob("_C*.so"), *folder.glob("_C*.pyd")):
        try:
            torch.ops.load_library(str(binary))
        except OSError:
            continue
        return True
    return False
