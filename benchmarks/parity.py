"""How far we are from the reference: runs the parity tests and keeps the largest absolute error of each fixture.

    python benchmarks/parity.py

Every comparison that the tests make is watched, so the table says exactly what they check. Writes
``benchmarks/results/parity.json``.
"""

import json
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data_prep.atomic import atomic_path

HOME = Path(__file__).parents[1]
TESTS = {
    "vision_a (ViT, perceivers)": (
        "encoders/test_vision_parity.py::test_vision",
        "models/test_lamed_parity.py::test_perceivers",
    ),
    "clip_a (CLIP pair, gradients)": ("encoders/test_vision_parity.py::test_clip",),
    "lamed_a (words, masks, gradients, generation)": ("models/test_lamed_parity.py",),
    "segvol_a (mask head)": ("segvol_head/test_segvol_parity.py",),
    "segflow (zoom-out-zoom-in)": ("segvol_head/test_zoom.py::test_all_four_modes",),
    "losses (Dice, BCE, gradients, released Dice)": (
        "segvol_head/test_segvol_losses.py::test_values",
        "bench/test_published.py",
    ),
    "preproc (published preparation)": ("data_prep/test_preproc_parity.py",),
    "vision_a, converted through files": (
        "convert/test_convert_parity.py::test_a_bare_vit",
        "convert/test_convert_parity.py::test_a_perceiver",
    ),
    "clip_a, converted through files": ("convert/test_convert_parity.py::test_clip",),
    "lamed_a, converted through files": ("convert/test_convert_parity.py::test_lamed_speaks",),
    "segvol_a, converted through files": ("convert/test_convert_parity.py::test_segvol_reads",),
    "a small Phi-3 of transformers, converted": ("convert/test_convert_parity.py::test_phi3",),
}


class Watch:
    """A pytest plugin that sees every comparison of the running test."""

    def __init__(self) -> None:
        self.found: dict[str, dict[str, float]] = defaultdict(lambda: {"values": 0, "error": 0.0})
        self.name = ""

    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        """Know which fixture the coming test belongs to, and see its own ``max_error`` and ``close``."""
        node = item.nodeid.removeprefix("tests/")
        names = [name for name, starts in TESTS.items() if node.startswith(starts)]
        self.name = max(names, key=lambda name: max(len(s) for s in TESTS[name] if node.startswith(s))) if names else ""
        for helper in ("max_error", "close"):
            own = getattr(item.module, helper, None)
            if own is not None and not hasattr(own, "watched"):
                setattr(item.module, helper, self.wrap(own))

    def wrap(self, compare: Any) -> Any:
        """The same comparison, noted."""

        def watched(ours: Any, theirs: Any, *args: Any, **kwargs: Any) -> Any:
            self.note(ours, theirs)
            return compare(ours, theirs, *args, **kwargs)

        watched.watched = True
        return watched

    def note(self, ours: Any, theirs: Any) -> None:
        """Keep the largest difference of finite values."""
        if not self.name or not isinstance(ours, torch.Tensor | np.ndarray):
            return
        a, b = (np.asarray(x.detach() if isinstance(x, torch.Tensor) else x, dtype=np.float64) for x in (ours, theirs))
        finite = np.isfinite(a) & np.isfinite(b)
        row = self.found[self.name]
        row["values"] += int(finite.sum())
        row["error"] = max(row["error"], float(np.abs(a - b)[finite].max(initial=0.0)))


def main() -> None:
    """Run the parity tests, watched."""
    watch = Watch()
    torch.testing.assert_close = watch.wrap(torch.testing.assert_close)
    files = sorted({start.split("::")[0] for starts in TESTS.values() for start in starts})
    code = pytest.main(["-q", "--no-header", *(str(HOME / "tests" / name) for name in files)], plugins=[watch])
    if code:
        sys.exit(code)
    result = {"command": "python benchmarks/parity.py", "max_abs_error": {name: watch.found[name] for name in TESTS}}
    with atomic_path(HOME / "benchmarks" / "results" / "parity.json") as temporary:
        temporary.write_text(json.dumps(result, indent=1), encoding="utf-8")
    for name, row in result["max_abs_error"].items():
        print(f"{name:48} {row['values']:>9,} {row['error']:.1e}")


if __name__ == "__main__":
    main()
