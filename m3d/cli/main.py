"""`m3d`: choose a subcommand, import only that one, and turn what goes wrong into one line.

Exit codes: 0 done, 1 the input or this machine cannot do it (one line says why), 2 the command line is not understood,
130 stopped by Ctrl-C.
"""

import argparse
import importlib
import logging
import os
import re
import sys
import warnings
from collections.abc import Mapping, Sequence
from typing import Protocol

import m3d
from m3d.cli.common import add_general_options, note, say_error, shortened

COMMANDS = {
    "report": "write the report of a scan",
    "ask": "ask a question about a scan",
    "locate": "find a structure: its box in voxels and mm",
    "segment": "draw a structure: by name, points, a box, or together",
    "inspect": "show what a model will see of a scan",
    "demo": "all of it on one scan, with files, pictures and a table",
    "data": "from data sets and your own scans to verified records and fast volumes",
    "bench": "M3D-Bench: ask a model all eight tasks, score the answers, compare runs",
    "train": "run a stage of training, or say what it would need (--dry-run)",
    "calibrate": "teach a model to say how likely a structure is in the scan at all",
    "convert": "released M3D-LaMed, M3D-CLIP and SegVol checkpoints become folders of ours",
    "export": "write a model for other programs: the released code, peft, MONAI; or push it to the hub",
    "doctor": "check this installation and say what fixes it",
}
EPILOG = """\
examples:
  m3d demo                                    a first look, on a scan it finds or makes
  m3d report ct.nii.gz
  m3d ask ct.nii.gz "Is the mandible visible?"
  m3d segment dicom_folder/ "spinal cord" --out out
  m3d inspect ct.nii.gz                       shape, spacing, orientation, what the model sees

`m3d COMMAND --help` explains a command. Not for clinical use.
"""


class Shape(argparse.RawDescriptionHelpFormatter):
    """Descriptions and examples as they are written; the longest command's summary beside it, as all others'."""

    def add_argument(self, action: argparse.Action) -> None:
        """Leave room for the indent of commands, which argparse forgets."""
        super().add_argument(action)
        if isinstance(action.choices, dict):
            longest = max(map(len, action.choices), default=0) + self._current_indent + self._indent_increment
            self._action_max_length = max(self._action_max_length, longest)


class Command(Protocol):
    """What a subcommand's module has."""

    DESCRIPTION: str
    EPILOG: str

    def configure(self, parser: argparse.ArgumentParser) -> None:
        """Add the command's own arguments."""

    def run(self, arguments: argparse.Namespace) -> int:
        """Do it; the exit code."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; the exit code."""
    words = _join_negative(sys.argv[1:] if argv is None else argv)
    parser, command = _parser([word for word in words if not word.startswith("-")])
    arguments = _parse(parser, words)
    assert command is not None
    _quieten(arguments.traceback)
    try:
        code = command.run(arguments)
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        say_error("stopped; nothing half-written was left")
        return 130
    except BrokenPipeError:  # `m3d ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (ValueError, OSError, ModuleNotFoundError, MemoryError) as error:
        if arguments.traceback:
            raise
        say_error(shortened(_line(error), 600))
        return 1


def _parser(words: Sequence[str]) -> tuple[argparse.ArgumentParser, Command | None]:
    """All commands by name, the one that ``words`` choose with its arguments."""
    parser = argparse.ArgumentParser(
        prog="m3d", description="Talk to a 3D medical scan.", epilog=EPILOG, formatter_class=Shape, allow_abbrev=False
    )
    parser.add_argument("--version", action="version", version=f"m3d {m3d.__version__}")
    return parser, _add_commands(parser, "m3d.cli", COMMANDS, words)


def _parse(parser: argparse.ArgumentParser, words: Sequence[str]) -> argparse.Namespace:
    """Parse; ``key=value`` may stand anywhere, where argparse alone would take it beside the config only."""
    arguments, rest = parser.parse_known_args(words)
    overrides = [word for word in rest if "=" in word and not word.startswith("-")]
    if rest and (overrides != rest or not hasattr(arguments, "overrides")):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if overrides:
        arguments.overrides = [*arguments.overrides, *overrides]
    return arguments


def _add_commands(
    parser: argparse.ArgumentParser, package: str, known: Mapping[str, str], words: Sequence[str]
) -> Command | None:
    """Add a package's commands; import the one that ``words`` begin with, which may be a package of commands itself."""
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    chosen: Command | None = None
    for name, summary in known.items():
        sub = commands.add_parser(name, help=summary, formatter_class=Shape, allow_abbrev=False)
        if words and words[0] == name:
            module = f"{package}.{name.replace('-', '_')}"
            command = importlib.import_module(module)
            sub.description, sub.epilog = command.DESCRIPTION, command.EPILOG
            if hasattr(command, "COMMANDS"):
                chosen = _add_commands(sub, module, command.COMMANDS, words[1:])
            else:
                command.configure(sub)
                add_general_options(sub, device=package == "m3d.cli")
                chosen = command
    return chosen


def _join_negative(words: Sequence[str]) -> list[str]:
    """``--point -12,3,4`` to ``--point=-12,3,4``: argparse takes a value that begins with a minus for an option."""
    joined: list[str] = []
    for word in words:
        if joined and joined[-1] in ("--point", "--box") and re.match(r"-[\d.]", word):
            joined[-1] += f"={word}"
        else:
            joined.append(word)
    return joined


class _OneLine(logging.Handler):
    """Our own warnings, and anybody's errors, in one line each on what is stderr at that moment."""

    def emit(self, record: logging.LogRecord) -> None:
        """Say it, unless it is another library's chatter or stands in every output of ours anyway."""
        ours = record.name.split(".")[0] in ("m3d", "data_prep", "encoders", "segvol_head")
        if record.levelno >= (logging.WARNING if ours and record.name != "m3d.inference.load" else logging.ERROR):
            note(f"m3d: {shortened(record.getMessage(), 600)}")


def _quieten(everything: bool) -> None:
    root = logging.getLogger()
    if not any(isinstance(handler, _OneLine) for handler in root.handlers):
        root.addHandler(_OneLine())
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # every model is a folder here
    if not everything:
        warnings.simplefilter("ignore")


def _line(error: BaseException) -> str:
    """An error as one line that names the thing and the way out."""
    if isinstance(error, MemoryError):
        return "out of memory; close other programs, or use a smaller scan"
    if isinstance(error, ModuleNotFoundError) and str(error).startswith("No module named"):
        return f"{error.name} is not installed; `m3d doctor` lists what is missing and the command that installs it"
    if isinstance(error, OSError) and error.strerror:
        named = f"{error.filename}: " if error.filename is not None else ""
        return f"{named}{error.strerror}"
    return str(error) or type(error).__name__
