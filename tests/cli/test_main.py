"""The front door: quick help, exit codes, one line an error."""

import subprocess
import sys
from pathlib import Path

import pytest

from m3d.cli import main
from m3d.cli.bench import COMMANDS as BENCH_COMMANDS
from m3d.cli.data import COMMANDS as DATA_COMMANDS
from m3d.cli.main import COMMANDS

ROOT = Path(__file__).parents[2]
HEAVY = ("torch", "transformers", "matplotlib", "numpy", "nibabel", "rich")


GROUPS = {"data": DATA_COMMANDS, "bench": BENCH_COMMANDS}
NAMES = [[name] for name in COMMANDS] + [[group, name] for group, names in GROUPS.items() for name in names]


@pytest.mark.parametrize("words", [["--help"], *([*words, "--help"] for words in NAMES)], ids=" ".join)
def test_help_imports_nothing_heavy(words):
    code = f"""
import sys
from m3d.cli import main
try:
    main({words})
except SystemExit as stop:
    assert stop.code == 0
print("heavy:", [name for name in {HEAVY} if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.rstrip().endswith("heavy: []")


def test_help_is_quick():
    code = """
import time
from m3d.cli import main
try:
    main(["--help"])
except SystemExit:
    print(time.process_time())
"""
    runs = [
        subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, capture_output=True, text=True).stdout
        for _ in range(3)
    ]
    assert all(f"    {name} " in runs[0] for name in COMMANDS)
    assert min(float(said.split()[-1]) for said in runs) < 0.3


EVERY = [words for words in NAMES if words[-1] not in GROUPS]
NO_MODEL = [*DATA_COMMANDS, *(name for name in BENCH_COMMANDS if name != "run")]


@pytest.mark.parametrize("words", EVERY, ids=" ".join)
def test_every_command_teaches_with_examples_and_takes_the_common_options(words, capsys):
    with pytest.raises(SystemExit) as stop:
        main([*words, "--help"])
    said = capsys.readouterr().out
    assert stop.value.code == 0
    assert f"  m3d {' '.join(words)}" in said.partition("examples:\n")[2]
    device = [] if words[0] in GROUPS and words[1] in NO_MODEL else ["--device"]
    for option in ("--json", "--out", "--force", "--traceback", *device):
        assert option in said
    if words[0] not in ("calibrate", "doctor", "data", "train", "bench", "export", "convert"):
        for option in ("--model", "--series", "--spacing"):
            assert option in said


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["dance"],
        ["ask", "ct.nii.gz"],
        ["segment", "ct.nii.gz"],
        ["segment", "ct.nii.gz", "--point", "1,2"],
        ["segment", "ct.nii.gz", "--point", "1,2,x"],
        ["segment", "ct.nii.gz", "--box", "1,2,3"],
        ["report", "ct.nii.gz", "--device", "tpu"],
        ["report", "ct.nii.gz", "--spacing", "1"],
        ["demo", "ct.nii.gz", "--phantom", "1"],
    ],
)
def test_a_command_line_that_is_not_understood_is_exit_code_2(words, capsys):
    with pytest.raises(SystemExit) as stop:
        main(words)
    captured = capsys.readouterr()
    assert stop.value.code == 2
    assert captured.out == "" and "error:" in captured.err


def test_version(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out.startswith("m3d ")


def test_traceback_shows_the_whole(fake):
    with pytest.raises(FileNotFoundError):
        main(["report", "nowhere.nii.gz", "--traceback"])


def test_ctrl_c_is_130_and_one_line(fake, run, ct, monkeypatch):
    import m3d.inference.results as results

    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(results, "write_mask", stop)
    code, out, err = run("segment", ct, "mandible")
    assert (code, out, err) == (130, "", "m3d: error: stopped; nothing half-written was left\n")
    assert not Path("out").exists()


def test_memory_errors_are_told_in_words(fake, run, ct, monkeypatch):
    def hungry(*_, **__):
        raise MemoryError

    monkeypatch.setattr("data_prep.read.read_volume", hungry)
    code, _, err = run("report", ct)
    assert code == 1 and err.startswith("m3d: error: out of memory")


def test_a_missing_package_points_to_the_doctor(fake, run, ct, monkeypatch):
    import m3d as package

    def absent(*_, **__):
        raise ModuleNotFoundError("No module named 'torch'", name="torch")

    monkeypatch.setattr(package, "load", absent)
    code, _, err = run("report", ct)
    assert code == 1
    assert err == (
        "m3d: error: torch is not installed; `m3d doctor` lists what is missing and the command that installs it\n"
    )


def test_our_own_mistakes_are_not_hidden(fake, ct, monkeypatch):
    monkeypatch.setattr("data_prep.read.read_volume", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        main(["report", str(ct)])
