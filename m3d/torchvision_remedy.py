"""Let a CPU build of torch live beside PyPI's torchvision, whose C++ operators then cannot load.

torchvision registers fake kernels for ``torchvision::nms`` and ``torchvision::qnms`` when it is imported, and fails where
those operators do not exist; transformers, peft, timm and open_clip fail with it. Defining the two schemas is enough.
An import hook does so at torchvision's first import, whoever asks for it, so that ``import m3d`` needs no torch.
"""

import importlib.machinery
import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
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
    """Apply the remedy at the first import of torchvision, then step aside."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """Never finds anything; the ordinary finders do."""
        if fullname == "torchvision":
            if self in sys.meta_path:
                sys.meta_path.remove(self)
            apply()
        return None


def install() -> None:
    """Put the hook in place, once, where torchvision is not yet imported."""
    if "torchvision" not in sys.modules and not any(isinstance(hook, TorchvisionHook) for hook in sys.meta_path):
        sys.meta_path.insert(0, TorchvisionHook())


def apply() -> State:
    """Define the missing schemas if torchvision is installed and its own operators cannot load."""
    folder = _folder()
    if folder is None:
        return "absent"
    import torch

    if hasattr(torch.ops.torchvision, "nms"):
        return "remedied" if _libraries else "native"
    if _loads(folder):
        return "native"
    library = torch.library.Library("torchvision", "DEF")
    for schema in SCHEMAS:
        library.define(schema)
    _libraries.append(library)
    return "remedied"


def state() -> State:
    """What is the matter with torchvision here: for `m3d doctor`."""
    found = apply()
    if found == "absent":
        return found
    try:
        importlib.import_module("torchvision")
    except (ImportError, RuntimeError):
        return "broken"
    return found


def _folder() -> Path | None:
    hooks = [hook for hook in sys.meta_path if isinstance(hook, TorchvisionHook)]
    for hook in hooks:  # find_spec would call us again
        sys.meta_path.remove(hook)
    spec = importlib.util.find_spec("torchvision")
    sys.meta_path[:0] = hooks
    return None if spec is None or spec.origin is None else Path(spec.origin).parent


def _loads(folder: Path) -> bool:
    import torch

    for binary in (*folder.glob("_C*.so"), *folder.glob("_C*.pyd")):
        try:
            torch.ops.load_library(str(binary))
        except OSError:
            continue
        return True
    return False
