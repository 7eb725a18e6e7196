"""What the README and the documents tell a newcomer to type really runs."""

import re
import shlex
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from data_prep.phantoms import head_neck
from data_prep.preprocess import Preprocess
from data_prep.sources.m3d_seg import seg_datasets
from data_prep.sources.registry import build_source
from data_prep.write import write_volume
from m3d.bench.bootstrap import estimate, summed
from m3d.bench.config import BenchConfig
from m3d.cli.main import _parser, main
from m3d.config import load_config

HOME = Path(__file__).parents[1]
README = (HOME / "README.md").read_text(encoding="utf-8")
DATA = (HOME / "docs" / "data.md").read_text(encoding="utf-8")
BENCH = (HOME / "docs" / "bench.md").read_text(encoding="utf-8")


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


def test_the_commands_and_the_python_of_the_data_document_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    shown = re.search(r"^```\n\$ (m3d data prepare .*?)^```", DATA, re.MULTILINE | re.DOTALL)
    commands = [line[2:] for line in shown.group(0).splitlines() if line.startswith("$ ")]
    assert [shlex.split(command)[2] for command in commands] == ["prepare", "verify", "show"]
    smaller = {"prepare": ["sources.0.seeds={train: [0, 2]}", "--workers", "0"], "show": ["--task", "rec.box3d"]}
    for command in commands:
        words = [word for word in shlex.split(command)[1:] if "seeds" not in word]
        assert main([*words, *smaller.get(words[1], [])]) == 0, capsys.readouterr().err
    assert len(list((tmp_path / "samples").glob("*.png"))) >= 1
    capsys.readouterr()
    (block,) = re.findall(r"^```python\n(.*?)^```", DATA, re.MULTILINE | re.DOTALL)
    exec(compile(block, "data.md", "exec"), {})
    said = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"\(64, 64, 96\) \([\d., ]+\) SPL", said[0])
    assert said[1].endswith("entries of m3d-head-and-neck-phantom/phantom_0")


def test_the_config_of_the_data_document_builds(tmp_path):
    (block,) = re.findall(r"^```yaml\n(.*?)^```", DATA, re.MULTILINE | re.DOTALL)
    config = yaml.safe_load(block)
    assert Preprocess.from_dict(config["preprocess"]).grid == (32, 256, 256)
    for fields in config["sources"]:
        fields.pop("derive", None)
        assert build_source(fields, root=tmp_path).name == fields["kind"]


def test_the_config_of_the_bench_document_builds_and_its_overrides_too(tmp_path):
    block, kinds = re.findall(r"^```yaml\n(.*?)^```", BENCH, re.MULTILINE | re.DOTALL)
    (tmp_path / "bench.yaml").write_text(block, encoding="utf-8")
    (overrides,) = re.findall(r"typed behind the config: `(.*?)`", BENCH)
    config = load_config(BenchConfig, tmp_path / "bench.yaml", overrides.split())
    assert (config.tasks["vqa.closed"].most, config.batch) == (100, 8)
    assert config.tasks["seg.sem"].datasets[0] in {f"M3D-Seg:{one.name}" for one in seg_datasets().values()}
    (tmp_path / "kinds.yaml").write_text(kinds, encoding="utf-8")
    assert len(load_config(BenchConfig, tmp_path / "kinds.yaml").tasks["seg.sem"].prompts) == 7


def test_the_datasets_of_the_published_benchmark_are_known():
    tasks = load_config(BenchConfig, "configs/bench/m3d_bench.yaml").tasks
    known = {f"M3D-Seg:{one.name}": code for code, one in seg_datasets().items()}
    assert [known[name] for name in tasks["seg.ref"].datasets] == ["0003", "0011", "0012"]
    assert [known[name] for name in tasks["rec.box3d"].datasets] == ["0003"]


def test_the_metric_of_the_bench_document_counts():
    (block,) = re.findall(r"^```python\n(.*?)^```", BENCH, re.MULTILINE | re.DOTALL)
    names: dict = {}
    exec(compile(block, "bench.md", "exec"), names)
    metric = names["Brevity"](2)
    rows = metric.statistics([SimpleNamespace(said="two words"), SimpleNamespace(said="three words here")])
    assert rows.tolist() == [[1.0], [0.0]]
    found = estimate(metric, summed(rows, ["a", "b"]))
    assert (found.value, found.n) == (0.5, 2)


def test_the_commands_of_the_bench_document_are_understood(capsys):
    said = re.findall(r"^m3d bench (\w+) (.*?)(?:#.*)?$", BENCH, re.MULTILINE)
    assert {command for command, _ in said} == {"run", "score", "table", "compare", "judge"}
    for command, rest in said:
        for line in rest.split("&& m3d bench "):
            words = shlex.split(line.removeprefix(f"{command} "))
            parser, _ = _parser(["bench", command])
            assert parser.parse_known_args(["bench", command, *words])[0].out is None or command == "run"
