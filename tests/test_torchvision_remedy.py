"""In processes of their own, because what torchvision registers in one stays there."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

HOME = Path(__file__).parents[1]
BROKEN = "RuntimeError: operator torchvision::nms does not exist"


def python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], cwd=HOME, capture_output=True, text=True, timeout=300)


def said(code: str) -> str:
    done = python(code)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip().splitlines()[-1]


@pytest.fixture(scope="module")
def broken() -> bool:
    """Whether torchvision, left alone, cannot be imported here: with CPU builds of torch."""
    pytest.importorskip("torchvision")
    return BROKEN in python("import torchvision").stderr


def test_import_m3d_is_quick_and_needs_no_torch():
    code = """
import json, sys, time
began = time.perf_counter()
import m3d
seconds = time.perf_counter() - began
import importlib.util
importlib.util.find_spec("torchvision")  # a look is no import
heavy = {"torch", "torchvision", "transformers", "monai", "numpy"} & set(sys.modules)
print(json.dumps([seconds, sorted(heavy)]))
"""
    seconds, heavy = json.loads(said(code))
    print(f"import m3d: {1000 * seconds:.0f} ms")  # noqa: T201
    assert heavy == []
    assert seconds < 2


def test_transformers_and_open_clip_import_after_m3d(broken):
    code = """
import m3d
from transformers import LlamaForCausalLM, Trainer
import open_clip
from m3d import torchvision_remedy
import torchvision.transforms.v2
torchvision_remedy.install()
print(torchvision_remedy.state(), sum("TorchvisionHook" in str(hook) for hook in sys.meta_path))
"""
    assert said("import sys" + code) == f"{'remedied' if broken else 'native'} 0"


def test_without_m3d_they_fail_where_torchvision_is_broken_and_m3d_mends_it_still(broken):
    if not broken:
        pytest.skip("torchvision's own operators load here")
    code = """
try:
    from transformers import LlamaForCausalLM
except (ImportError, RuntimeError) as error:
    print(error.__cause__ or error)
from m3d import torchvision_remedy
print(torchvision_remedy.state(), torchvision_remedy.state(), torchvision_remedy.apply())
"""
    done = python(code)
    assert "torchvision::nms does not exist" in done.stdout
    assert done.stdout.endswith("remedied remedied remedied\n"), done.stderr


def test_absent_torchvision_is_left_absent():
    code = """
import importlib.util, sys
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: None if name == "torchvision" else find(name, package)
from m3d import torchvision_remedy
print(torchvision_remedy.state(), "torch" in sys.modules)
"""
    assert said(code) == "absent False"


def test_a_torchvision_that_fails_for_another_reason_is_called_broken(tmp_path):
    (tmp_path / "torchvision").mkdir()
    (tmp_path / "torchvision" / "__init__.py").write_text("raise ImportError('cut short')", encoding="utf-8")
    code = f"""
import sys
sys.path.insert(0, {str(tmp_path)!r})
from m3d import torchvision_remedy
print(torchvision_remedy.state())
"""
    assert said(code) == "broken"


def test_another_project_in_place_of_a_sibling_is_explained(tmp_path):
    (tmp_path / "encoders").mkdir()
    (tmp_path / "encoders" / "__init__.py").touch()
    done = python(f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import m3d")
    assert "ImportError: package 'encoders' should lie in" in done.stderr
    assert "uninstall it" in done.stderr
