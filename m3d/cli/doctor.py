"""`m3d doctor`: what this machine has, what is missing, and the command that fixes each; works without torch too."""

from __future__ import annotations

import argparse
import configparser
import importlib
import json
import os
import platform
import re
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import m3d
from m3d.cli.common import check_out, console, note, say_json, working
from m3d.convert.hub import cache_dir

DESCRIPTION = "Check this installation: versions, devices, torchvision, disk, extras and models, with what fixes each."
EPILOG = """\
examples:
  m3d doctor
  m3d doctor --device cuda          also fails when there is no usable CUDA device
  m3d doctor --json > doctor.json   to attach to a bug report: it names no person and no scan

Exit code 1 when something essential is missing.
"""
DISTRIBUTION = "m3d-lamed"
DEFAULT_MODEL = "m3d-tiny"
FACTS = "doctor.json"
LOW_DISK = 2 * 10**9
SIGNS = {"ok": "[green]ok[/]", "note": "[yellow]note[/]", "missing": "[bold red]missing[/]"}


@dataclass(frozen=True)
class Check:
    """One thing looked at; ``missing`` is essential, ``note`` is not; ``fix`` is a command or what to do."""

    section: str
    name: str
    state: Literal["ok", "note", "missing"]
    detail: str
    fix: str = ""


@dataclass(frozen=True)
class Requirement:
    """A package that we, or an extra of ours, need."""

    name: str
    versions: str
    extra: str


def configure(parser: argparse.ArgumentParser) -> None:
    """No arguments of its own."""


def run(arguments: argparse.Namespace) -> int:
    """Check everything, then say it."""
    check_out(arguments, [FACTS])
    with working("checking"):
        checks = list(_checks(arguments.device))
    healthy = all(check.state != "missing" for check in checks)
    facts = {"schema": "m3d.doctor/1", "ok": healthy, "checks": [asdict(check) for check in checks]}
    if arguments.out is not None:
        from m3d.inference.results import staged, write_json

        with staged(arguments.out, [FACTS], force=arguments.force, needed=100_000) as stage:
            write_json(stage / FACTS, facts)
    if arguments.json:
        say_json(facts)
    else:
        _say_checks(checks)
        missing = ", ".join(check.name for check in checks if check.state == "missing")
        note("all that is essential is here" if healthy else f"essential, but missing or broken: {missing}")
    return 0 if healthy else 1


def _say_checks(checks: list[Check]) -> None:
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=None, padding=(0, 2, 0, 0), show_header=False)
    last = ""
    for check in checks:
        section = "" if check.section == last else f"[bold]{check.section}[/]"
        fix = f"\n[cyan]{escape(check.fix)}[/]" if check.fix else ""
        table.add_row(section, check.name, SIGNS[check.state], escape(check.detail) + fix)
        last = check.section
    console().print(table)


def _checks(device: str) -> Iterator[Check]:
    yield Check("versions", "python", "ok", f"{platform.python_version()}, {platform.system()} {platform.machine()}")
    yield Check("versions", "m3d", "ok", m3d.__version__)
    requirements = _requirements()
    yield from (_package(requirement) for requirement in requirements if not requirement.extra)
    torch, problem = _import("torch")
    if problem:
        yield Check("devices", "torch", "missing", problem, "pip install --force-reinstall 'torch>=2.6'")
    yield from _devices(torch, device)
    if torch is not None:
        yield _torchvision()
    yield from _disks()
    yield from _extras(requirements)
    yield from _models()


def _requirements() -> list[Requirement]:
    """What packaging says we need: from the installed metadata, or from a checkout's own setup.cfg."""
    try:
        lines = metadata.requires(DISTRIBUTION) or []
    except metadata.PackageNotFoundError:
        config = configparser.ConfigParser()
        config.read(Path(m3d.__file__).parent.parent / "setup.cfg", encoding="utf-8")
        lines = config.get("options", "install_requires", fallback="").split()
        extras = config["options.extras_require"] if "options.extras_require" in config else {}
        lines += [f'{line}; extra == "{extra}"' for extra, names in extras.items() for line in names.split()]
    found = [re.match(r"([\w.-]+)(?:\[[^]]*\])?\s*([^;]*?)\s*(?:;(.*))?$", line) for line in lines]
    parts = [match.groups(default="") for match in found if match]
    extra = re.compile(r"""extra\s*==\s*["']([\w-]+)["']""")
    return [
        Requirement(name, versions, match.group(1) if (match := extra.search(marker)) else "")
        for name, versions, marker in parts
    ]


def _package(requirement: Requirement) -> Check:
    fix = f"pip install '{requirement.name}{requirement.versions}'"
    try:
        version = metadata.version(requirement.name)
    except metadata.PackageNotFoundError:
        return Check("versions", requirement.name, "missing", "not installed", fix)
    if not _satisfies(version, requirement.versions):
        return Check("versions", requirement.name, "missing", f"{version}, but {requirement.versions} is needed", fix)
    return Check("versions", requirement.name, "ok", version)


def _satisfies(version: str, versions: str) -> bool:
    try:
        from packaging.specifiers import SpecifierSet
    except ModuleNotFoundError:
        return True
    return SpecifierSet(versions).contains(version, prereleases=True)


def _import(name: str) -> tuple[ModuleType | None, str]:
    """A module, or in a few words why there is none."""
    try:
        return importlib.import_module(name), ""
    except ModuleNotFoundError as error:
        return None, "not installed" if error.name == name else f"cannot be imported: {error}"
    except (ImportError, OSError, RuntimeError) as error:
        return None, f"cannot be imported: {' '.join(str(error).split())[:160]}"


def _devices(torch: ModuleType | None, wanted: str) -> Iterator[Check]:
    threads = "" if torch is None else f", torch uses {torch.get_num_threads()} threads"
    yield Check("devices", "cpu", "ok", f"{os.cpu_count()} cores{threads}, {_memory()}")
    usable = {"auto", "cpu"}
    if torch is not None and torch.cuda.is_available():
        usable.add("cuda")
        for number in range(torch.cuda.device_count()):
            free, total = torch.cuda.mem_get_info(number)
            detail = f"{torch.cuda.get_device_name(number)}, {_gigabytes(free)} free of {_gigabytes(total)}"
            yield Check("devices", f"cuda:{number}", "ok", detail)
    elif shutil.which("nvidia-smi"):
        fix = "install a CUDA build of torch: https://pytorch.org/get-started/locally"
        yield Check("devices", "cuda", "note", "an NVIDIA driver is here, but torch cannot use it", fix)
    if torch is not None and torch.backends.mps.is_available():
        usable.add("mps")
        yield Check("devices", "mps", "ok", "Apple GPU, shares the memory above")
    if wanted not in usable:
        yield Check(
            "devices", wanted, "missing", "asked for, but not usable here", "--device auto, or install its driver"
        )


def _torchvision() -> Check:
    from m3d import torchvision_remedy

    state, problem = "broken", ""
    try:
        state = torchvision_remedy.state()
    except (ImportError, OSError, RuntimeError) as error:
        problem = f": {' '.join(str(error).split())[:160]}"
    details = {
        "absent": "not installed, and not needed",
        "native": "its own operators work",
        "remedied": "its own operators cannot load beside this torch; m3d stands in for them",
    }
    if state in details:
        return Check("devices", "torchvision", "ok", details[state])
    fix = "pip uninstall torchvision, or install the one that belongs to this torch"
    return Check("devices", "torchvision", "missing", f"cannot be imported, and breaks transformers{problem}", fix)


def _disks() -> Iterator[Check]:
    for name, folder in (("here", Path.cwd()), ("cache", cache_dir())):
        there = next(parent for parent in (folder, *folder.parents) if parent.exists())
        free = shutil.disk_usage(there).free
        writable = os.access(there, os.W_OK)
        detail = f"{_gigabytes(free)} free" + ("" if writable else ", not writable")
        fix = "" if free >= LOW_DISK else "make room: results and downloads may not fit"
        fix = fix if writable else "choose a folder with --out" if name == "here" else "set XDG_CACHE_HOME"
        yield Check("disk", name, "note" if fix else "ok", detail, fix)


def _extras(requirements: list[Requirement]) -> Iterator[Check]:
    for extra in dict.fromkeys(requirement.extra for requirement in requirements if requirement.extra):
        checks = [_package(requirement) for requirement in requirements if requirement.extra == extra]
        absent = [check.name for check in checks if check.state != "ok"]
        fix = f"pip install '{DISTRIBUTION}[{extra}]'" if absent else ""
        detail = f"without {', '.join(absent)}" if absent else ", ".join(f"{c.name} {c.detail}" for c in checks)
        yield Check("extras", extra, "note" if absent else "ok", detail, fix)


def _models() -> Iterator[Check]:
    from m3d.inference.checkpoints import bundled, resolve

    names = bundled()
    if DEFAULT_MODEL not in names:
        fix = f"pip install --force-reinstall {DISTRIBUTION}, or train one and name its folder with --model"
        yield Check("models", DEFAULT_MODEL, "missing", "no bundled model in this installation", fix)
    for name in names:
        try:
            folder = resolve(name)
            manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            detail = " ".join(str(error).split())
            yield Check("models", name, "missing", detail, f"pip install --force-reinstall {DISTRIBUTION}")
            continue
        size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
        yield Check("models", name, "ok", f"{size / 1e6:.1f} MB, {_manifest(manifest)}")


def _manifest(manifest: dict[str, Any]) -> str:
    """What a manifest says that fits on a line."""
    plain = [f"{key} {value}" for key, value in manifest.items() if isinstance(value, str | int | float)]
    return "; ".join(part[:60] for part in plain[:3]) or f"manifest with {', '.join(manifest)}"


def _memory() -> str:
    import psutil  # type: ignore[import-untyped]

    from m3d.memory import available_memory

    return f"{_gigabytes(available_memory())} free of {_gigabytes(psutil.virtual_memory().total)} memory"


def _gigabytes(count: float) -> str:
    return f"{count / 1e9:.1f} GB"
