"""The house stays in order: what is declared is what is there, and every room keeps to its own."""

import ast
import configparser
import re
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

HOME = Path(__file__).parents[1]
ROOMS = ("encoders", "segvol_head", "data_prep", "m3d")
FOLDERS = {*ROOMS, "configs", "tests", "benchmarks", "docs", ".ci"}
VAGUE = {"utils", "util", "helpers", "helper", "common", "misc", "tools", "functions", "core"}
CARRIED = {  # what a room may import beside the standard library and itself
    "encoders": {"torch", "monai", "einops"},
    "segvol_head": {"torch", "monai", "einops"},
    "data_prep": {
        *{"numpy", "scipy", "nibabel", "SimpleITK", "pydicom", "highdicom", "pydantic", "yaml", "tqdm"},
        *{"PIL", "datasketch", "openai", "ray"},  # imported where they are used
    },
}
LARGEST_MB = 24


@pytest.fixture(scope="module")
def setup_cfg() -> configparser.ConfigParser:
    parser = configparser.ConfigParser()
    parser.read(HOME / "setup.cfg", encoding="utf-8")
    return parser


@pytest.fixture(scope="module")
def requirements(setup_cfg) -> dict[str, list[Requirement]]:
    """What is required, by extra; ``""`` is what everyone gets."""
    lists = {"": setup_cfg["options"]["install_requires"], **setup_cfg["options.extras_require"]}
    return {extra: [Requirement(line) for line in lines(text)] for extra, text in lists.items()}


@pytest.fixture(scope="module")
def pinned() -> dict[str, str]:
    text = (HOME / "constraints.txt").read_text(encoding="utf-8")
    pins = [line.split("==") for line in lines(text) if not line.startswith("#")]
    return {canonicalize_name(name): version for name, version in pins}


def lines(text: str) -> list[str]:
    return [line.strip() for line in text.splitlines() if line.strip()]


def modules(room: str) -> list[Path]:
    return sorted((HOME / room).rglob("*.py"))


def tracked() -> list[Path]:
    """Files under version control, and those that would be with the next commit."""
    listing = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        done = subprocess.run(listing, cwd=HOME, capture_output=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a git checkout")
    return [path for name in done.stdout.decode().split("\0") if name and (path := HOME / name).is_file()]


def imported(path: Path) -> set[str]:
    """Top-level names of every absolute import, wherever in the file it stands."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module.partition(".")[0])
    return found


def test_packages_listed_are_the_packages_on_disk(setup_cfg):
    listed = set(lines(setup_cfg["options"]["packages"]))
    there = {
        ".".join(init.parent.relative_to(HOME).parts) for room in ROOMS for init in (HOME / room).rglob("__init__.py")
    }
    assert listed == there | {"m3d.configs"}
    assert lines(setup_cfg["options"]["package_dir"]) == ["m3d.configs = configs"]


def test_every_module_lies_in_a_package():
    orphans = [path for room in ROOMS for path in modules(room) if not (path.parent / "__init__.py").is_file()]
    assert orphans == []


def test_configs_hold_yaml_and_json_only():
    kinds = {path.suffix for path in (HOME / "configs").rglob("*") if path.is_file()}
    assert kinds
    assert kinds <= {".yaml", ".json"}


def test_top_level_folders_are_the_designed_ones():
    there = {path.relative_to(HOME).parts[0] for path in tracked() if path.parent != HOME}
    assert there - FOLDERS == set()
    assert {*ROOMS, "configs", "tests", ".ci"} <= there


def test_no_module_at_depth_one_has_a_name_that_says_nothing():
    assert [path for room in ROOMS for path in (HOME / room).iterdir() if path.stem in VAGUE] == []


def test_test_files_have_names_of_their_own_and_no_packages():
    names = [path.name for path in (HOME / "tests").rglob("*.py") if path.name != "conftest.py"]
    assert sorted(names) == sorted(set(names))
    assert "__init__.py" not in names


@pytest.mark.parametrize("room", CARRIED)
def test_a_room_imports_only_what_it_may_carry(room):
    used = set().union(*(imported(path) for path in modules(room)))
    assert used - set(sys.stdlib_module_names) - CARRIED[room] - {room} == set()


def test_import_linter_keeps_the_rooms_apart():
    code = "from importlinter.cli import lint_imports_command; lint_imports_command()"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=HOME, capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 kept, 0 broken" in done.stdout


def test_everything_imported_is_required(requirements):
    owners = packages_distributions()
    used = set().union(*(imported(path) for room in ROOMS for path in modules(room)))
    used -= {*sys.stdlib_module_names, *ROOMS}
    declared = {canonicalize_name(item.name) for items in requirements.values() for item in items}
    missing = {name for name in used if not {canonicalize_name(owner) for owner in owners.get(name, [name])} & declared}
    assert missing == set()


def test_a_cuda_user_can_meet_the_requirements(requirements):
    everyone = {canonicalize_name(item.name): item for item in requirements[""]}
    assert str(everyone["torch"].specifier) == ">=2.6"
    assert not any(item.name == "torchvision" for items in requirements.values() for item in items)


def test_constraints_pin_every_requirement_within_its_range(requirements, pinned):
    for item in (item for items in requirements.values() for item in items):
        assert item.specifier.contains(pinned[canonicalize_name(item.name)]), item
    assert (pinned["torch"], pinned["torchvision"]) == ("2.13.0", "0.28.0")
    assert not any(mark in version for version in pinned.values() for mark in "+/@ ")


def test_pyproject_holds_the_build_system_and_ruff_only():
    settings = tomllib.loads((HOME / "pyproject.toml").read_text(encoding="utf-8"))
    assert set(settings) == {"build-system", "tool"}
    assert set(settings["tool"]) == {"ruff"}


def test_no_file_is_too_large_for_the_wheel():
    assert [path for path in tracked() if path.stat().st_size > LARGEST_MB * 2**20] == []
    bundled = sum(path.stat().st_size for path in (HOME / "m3d" / "bundled").rglob("*") if path.is_file())
    assert bundled <= LARGEST_MB * 2**20


def test_no_pickles_are_shared():
    assert [path for path in tracked() if path.suffix in {".pkl", ".pickle", ".pt", ".pth", ".ckpt", ".npz"}] == []


def test_make_help_lists_the_commands_of_the_readme():
    done = subprocess.run(["make", "-s", "-C", str(HOME)], capture_output=True, text=True, check=True)
    for target in ("demo", "test", "check", "bench"):
        assert re.search(rf"^{target}\s", done.stdout, re.MULTILINE), target


@pytest.mark.parametrize(
    "name", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "MODEL_CARD.md", "docs/data.md", "docs/training.md"]
)
def test_documents_name_files_and_targets_that_exist(name):
    text = (HOME / name).read_text(encoding="utf-8")
    links = [link.partition("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in link]
    assert [link for link in links if link and not ((HOME / name).parent / link).exists()] == []
    targets = set(re.findall(r"^([a-z]+):", (HOME / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    assert set(re.findall(r"`make ([a-z]+)`", text)) <= targets


def test_readme_shows_both_commands_and_python_that_imports_m3d_alone():
    text = (HOME / "README.md").read_text(encoding="utf-8")
    assert "make demo" in text
    assert "make test" in text
    blocks = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    assert blocks
    for block in blocks:
        roots = {name.partition(".")[0] for name in re.findall(r"^\s*(?:import|from)\s+([\w.]+)", block, re.MULTILINE)}
        assert not roots & {"encoders", "segvol_head", "data_prep"}
        compile(block, "README.md", "exec")


def test_the_changelog_has_the_version(setup_cfg):
    assert setup_cfg["metadata"]["version"] in (HOME / "CHANGELOG.md").read_text(encoding="utf-8")


def test_the_licence_is_apache_2_and_ours():
    text = (HOME / "LICENSE").read_text(encoding="utf-8")
    assert "Apache License" in text
    assert "Version 2.0, January 2004" in text
    assert "END OF TERMS AND CONDITIONS" in text
    assert "The M3D authors" in text
