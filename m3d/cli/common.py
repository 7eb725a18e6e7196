"""What the commands share: their options, reading a scan, and saying what was found.

Results go to stdout, as words or, with ``--json``, as one JSON document; everything else goes to stderr.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

    from data_prep.volume import Volume
    from m3d.inference.results import Result
    from m3d.inference.scan import Scan

DEVICES = ("auto", "cpu", "cuda", "mps")
SCAN_HELP = "NIfTI, NRRD, MHA/MHD, a DICOM folder or zip, or .npy with --spacing"


def add_general_options(parser: argparse.ArgumentParser, *, device: bool = True) -> None:
    """``--json --device --out --force --traceback``, which every command takes; `set_defaults` may name a folder.

    ``device`` is left out where no model runs.
    """
    out = parser.get_default("out")
    where = f"folder for files (default: {out})" if out else "folder for files; without it none is written"
    group = parser.add_argument_group("general")
    group.add_argument("--json", action="store_true", help="one JSON document on stdout, everything else on stderr")
    if device:
        group.add_argument("--device", choices=DEVICES, default="auto", help="auto takes CUDA, then MPS, then the CPU")
    group.add_argument("--out", type=Path, metavar="DIR", default=out, help=where)
    group.add_argument("--force", action="store_true", help="replace files that exist")
    group.add_argument("--traceback", action="store_true", help="on an error, show where in the code it happened")


def add_scan_options(parser: argparse.ArgumentParser, *, optional: bool = False) -> None:
    """The scan itself, and how it is read and by which model."""
    parser.add_argument("scan", metavar="SCAN", type=Path, nargs="?" if optional else None, help=SCAN_HELP)
    group = parser.add_argument_group("scan and model")
    group.add_argument(
        "--model", default="m3d-tiny", metavar="NAME_OR_PATH", help="a bundled model or a checkpoint folder (m3d-tiny)"
    )
    group.add_argument(
        "--quantize", choices=("4bit", "8bit"), help="load the language model in so many bits (needs bitsandbytes)"
    )
    group.add_argument("--series", metavar="UID", help="SeriesInstanceUID, where a DICOM folder holds several")
    group.add_argument(
        "--spacing", type=numbers(3), metavar="D,H,W", help="voxel size in mm of an .npy array, along its axes"
    )


def numbers(count: int) -> Callable[[str], tuple[float, ...]]:
    """An argparse type: so many comma-separated numbers."""

    def read(text: str) -> tuple[float, ...]:
        try:
            found = tuple(float(part) for part in text.split(","))
        except ValueError:
            found = ()
        if len(found) != count:
            raise argparse.ArgumentTypeError(f"{text!r} is not {count} numbers separated by commas")
        return found

    return read


def say(text: str = "") -> None:
    """A result, to stdout."""
    sys.stdout.write(f"{text}\n")


def note(text: str) -> None:
    """A remark, to stderr."""
    sys.stderr.write(f"{printable(text)}\n")


def printable(text: str) -> str:
    """Without what could drive a terminal: a model may say anything, a file may be named anything."""
    return "".join(letter if letter.isprintable() or letter == "\n" else "\N{REPLACEMENT CHARACTER}" for letter in text)


def shortened(text: str, length: int = 160) -> str:
    """One line, cut where it is too long to read."""
    line = printable(" ".join(text.split()))
    return line if len(line) <= length else f"{line[: length - 3]}..."


def say_error(text: str) -> None:
    """The one line of an error, to stderr."""
    note(f"m3d: error: {text}")


def say_json(content: dict[str, Any]) -> None:
    """The one document of ``--json``."""
    say(json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False))


def console(*, stderr: bool = False) -> Console:
    """For tables and colours, where the terminal has them."""
    from rich.console import Console

    plain = Console(stderr=stderr, highlight=False)
    return plain if plain.is_terminal else Console(stderr=stderr, highlight=False, width=120)


@contextmanager
def working(what: str) -> Iterator[None]:
    """Say what takes long, while it does, if a person is watching."""
    if not sys.stderr.isatty():
        yield
        return
    with console(stderr=True).status(f"[dim]{what} …[/dim]"):
        yield


def read_scan(arguments: argparse.Namespace) -> Volume:
    """Read the scan before anything heavy is loaded: a bad one is then told at once."""
    from data_prep.read import read_volume

    with working(f"reading {arguments.scan.name}"):
        return read_volume(arguments.scan, series=arguments.series, spacing=arguments.spacing)


def look(arguments: argparse.Namespace, volume: Volume, path: Path | None) -> Scan:
    """Load the model and let it look at a volume that was read."""
    import m3d

    with working(f"loading {arguments.model}"):
        model = m3d.load(arguments.model, device=arguments.device, quantize=arguments.quantize)
    with working("looking at the scan"):
        return dataclasses.replace(model.look(volume), path=path)


def open_scan(arguments: argparse.Namespace) -> Scan:
    """From the command line to a scan that can be asked; cheap checks come first."""
    from m3d.inference.checkpoints import resolve
    from m3d.inference.results import RESULT_NAME

    check_out(arguments, [RESULT_NAME])
    resolve(arguments.model)
    return look(arguments, read_scan(arguments), arguments.scan)


def check_out(arguments: argparse.Namespace, names: Sequence[str]) -> None:
    """Refuse before the work what would be refused after it."""
    from data_prep.atomic import refuse_overwrite

    for name in names:
        if arguments.out is not None:
            refuse_overwrite(arguments.out / name, arguments.force)


def deliver(arguments: argparse.Namespace, result: Result) -> int:
    """Save a result where ``--out`` says, then say it."""
    saved: Sequence[Path] = ()
    if arguments.out is not None:
        saved = result.save(arguments.out, force=arguments.force)
    if arguments.json:
        say_json({**result.to_dict(), "saved": [str(path) for path in saved]})
        return 0
    for line in spoken(result):
        say(printable(line))
    for warning in result.warnings:
        note(f"warning: {warning}")
    for path in saved:
        note(f"saved {path}")
    note(f"{result.model_id}, {result.seconds:.1f} s. Not for clinical use.")
    return 0


def spoken(result: Result) -> Iterator[str]:
    """A result in words: its text, what it rests on, then each mask and box."""
    if result.text and not result.asked:  # of several names, what follows says all
        yield result.text
    if result.measured:
        yield f"measured on the masks it drew: {'; '.join(map(str, result.measured))}"
    for mask in result.masks:
        yield f"{mask.name}: {mask.volume_ml:.1f} mL, score {mask.score:.2f}{_present(mask.present)}"
    for one in result.not_drawn:
        yield f"{one.name}: not drawn: {one.reason}{_present(one.present)}"
    for box in result.boxes:
        voxel = f"voxels {_triple(box.voxel.lo)} to {_triple(box.voxel.hi)}"
        yield f"{box.name or 'box'}: {voxel}; mm (R, A, S) {_triple(box.mm.lo)} to {_triple(box.mm.hi)}"


def _present(probability: float | None) -> str:
    return "" if probability is None else f", present {probability:.2f}"


def _triple(numbers: Sequence[float]) -> str:
    return f"({', '.join(f'{number:.1f}' for number in numbers)})"
