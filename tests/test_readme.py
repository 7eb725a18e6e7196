"""What the README tells a newcomer to type really runs, with the bundled model."""

import re
from pathlib import Path

import pytest

from data_prep.phantoms import head_neck
from data_prep.write import write_volume

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


@pytest.mark.integration
def test_the_python_block_runs_and_its_mask_has_the_scans_shape(tmp_path, monkeypatch, capsys):
    (block,) = re.findall(r"^```python\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    monkeypatch.chdir(tmp_path)
    write_volume(tmp_path / "out" / "phantom.nii.gz", head_neck(7).volume)
    exec(compile(block, "README.md", "exec"), {})
    report, _, mandible = capsys.readouterr().out.strip().splitlines()
    assert report.startswith("Head and neck CT")
    assert re.fullmatch(r"True [1-9]\d* mL", mandible)
    assert (tmp_path / "clicked" / "result.json").is_file()
