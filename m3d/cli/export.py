"""`m3d export MODEL [FOLDER] --format ...`: for other programs, and for the hub."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING

from m3d.cli.common import note, say, say_json

if TYPE_CHECKING:
    from m3d.export.hub import Upload
    from m3d.export.reference import Exported

FORMATS = {
    "lamed": "the released M3D-LaMed code: its names, shapes and config.json (LLaMA and Phi-3)",
    "m3d-clip": "the released M3D-CLIP code, of a pretrain_clip checkpoint",
    "segvol": "the mask head alone, as SegVol's released file names it",
    "peft": "LoRA adapters alone, for peft.PeftModel.from_pretrained; other trained parts go beside",
    "monai-bundle": "the mask head for `python -m monai.bundle run`, without a language model",
    "hub": "a folder with a model card, or with --repo a repository on the Hugging Face hub",
}
DESCRIPTION = (
    "Write a model as another program reads it. Weights stay what they are, in safetensors; what that program has no\n"
    "place for is an error that names it.\n\nformats:\n"
    + "\n".join(f"  {name:<14}{what}" for name, what in FORMATS.items())
)
EPILOG = """\
examples:
  m3d export m3d-tiny bundle --format monai-bundle --structures "mandible,spinal cord"
  m3d export runs/instruct adapters --format peft
  m3d export models/M3D-LaMed lamed --format lamed
  m3d export m3d-tiny share --format hub                          the folder that would be pushed, with its card
  m3d export m3d-tiny --format hub --repo jane/m3d-tiny --dry-run
  m3d export m3d-tiny --format hub --repo jane/m3d-tiny --private --revision v1

MODEL is a bundled model or a checkpoint folder (or the output of a stage of `m3d train`). A folder is written whole or
not at all; --force replaces an earlier export, and nothing else. The hub wants a token: `hf auth login`, or $HF_TOKEN.
Pickles and trainer state are never pushed.
"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the command's own arguments."""
    parser.set_defaults(usage_error=parser.error, offline=os.environ.get("HF_HUB_OFFLINE"))
    parser.add_argument("model", metavar="MODEL", help="a bundled model's name, or a checkpoint folder")
    parser.add_argument("folder", metavar="FOLDER", type=Path, nargs="?", help="the folder to write; --out is the same")
    parser.add_argument("--format", required=True, choices=FORMATS, help="see above")
    group = parser.add_argument_group("monai-bundle")
    group.add_argument(
        "--structures", metavar="A,B", help="what it draws by name (default: what the model was taught, if it says)"
    )
    group = parser.add_argument_group("hub")
    group.add_argument("--repo", metavar="USER/NAME", help="push there")
    group.add_argument("--private", action="store_true", help="where the repository is made, nobody else sees it")
    group.add_argument("--revision", metavar="BRANCH", help="push to this branch, made where it is not there")
    group.add_argument(
        "--metrics", type=Path, metavar="JSON", help="a result of benchmarks/tiny_accuracy.py, for the card"
    )
    group.add_argument("--dry-run", action="store_true", help="show files and card, write and push nothing")


def run(arguments: argparse.Namespace) -> int:
    """Export."""
    folder = arguments.folder or arguments.out
    if arguments.format == "hub":
        return _hub(arguments, folder)
    given = [name for name in ("repo", "private", "revision", "metrics", "dry_run") if getattr(arguments, name)]
    if given:
        arguments.usage_error(f"--{given[0].replace('_', '-')} is for --format hub")
    if folder is None:
        arguments.usage_error("name the folder to write")
    return _told(arguments, _exported(arguments, folder))


def _exported(arguments: argparse.Namespace, folder: Path) -> Exported:
    """To a folder of one of the other programs."""
    from m3d.export import adapters, bundle, reference

    source = _source(arguments.model, whole=arguments.format == "lamed")
    if arguments.format == "monai-bundle":
        structures = bundle.structures_of(source, arguments.structures)
        return bundle.export_bundle(source, folder, structures, force=arguments.force)
    if arguments.structures is not None:
        arguments.usage_error("--structures is for --format monai-bundle")
    export = {
        "lamed": reference.export_lamed,
        "m3d-clip": reference.export_clip,
        "segvol": reference.export_segvol,
        "peft": adapters.export_peft,
    }[arguments.format]
    return export(source, folder, force=arguments.force)


def _source(model: str, *, whole: bool) -> Path:
    """The checkpoint folder that is meant; a ``whole`` one is an M3D checkpoint with all of its files."""
    from m3d.inference.checkpoints import bundled, resolve
    from m3d.recipes.checkpoints import model_folder

    if model in bundled():
        return resolve(model)
    folder = model_folder(model)
    return resolve(folder) if whole else folder


def _told(arguments: argparse.Namespace, done: Exported) -> int:
    if arguments.json:
        say_json({"format": arguments.format, "folder": str(done.folder), "tensors": done.tensors, "notes": done.notes})
        return 0
    say(f"{done.folder}: {done.tensors} tensors, for {FORMATS[arguments.format]}")
    for one in done.notes:
        note(f"note: {one}")
    return 0


def _hub(arguments: argparse.Namespace, folder: Path | None) -> int:
    if arguments.repo is None and folder is None and not arguments.dry_run:
        arguments.usage_error("say where to: --repo USER/NAME, or a folder to write, or --dry-run to see it")
    if arguments.repo is not None:
        _go_online(arguments.offline)
    from m3d.export import hub

    if arguments.repo is not None:
        hub.check_repo(arguments.repo)
    source = _source(arguments.model, whole=True)
    upload = hub.gather(source, repo=arguments.repo, metrics=arguments.metrics)
    told = {"format": "hub", "repo": arguments.repo, "files": upload.sizes(), "left_out": upload.left_out}
    if arguments.dry_run:
        _show(upload) if not arguments.json else say_json({**told, "card": upload.card})
        return 0
    done = {}
    if folder is not None:
        done["folder"] = str(hub.write_folder(upload, folder, force=arguments.force))
    if arguments.repo is not None:
        done["commit"] = hub.push_to_hub(upload, arguments.repo, private=arguments.private, revision=arguments.revision)
    if arguments.json:
        say_json({**told, **done})
        return 0
    for where in done.values():
        say(f"{len(upload.files)} files, {sum(upload.sizes().values()):,} bytes: {where}")
    return 0


def _show(upload: Upload) -> None:
    for name, size in upload.sizes().items():
        say(f"{size:>13,}  {name}")
    for name in upload.left_out:
        note(f"left out: {name}")
    say(f"\n{upload.card}")


def _go_online(before: str | None) -> None:
    """`main` keeps huggingface_hub offline for all commands; here it is left as the user had it."""
    if before is None:
        os.environ.pop("HF_HUB_OFFLINE", None)
