"""`m3d bench run CONFIG`: ask a model; run it again to go on where it was stopped."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from m3d.cli.common import DEVICES, note, say, say_json
from m3d.cli.data.prepare import count
from m3d.config import find_config, load_config

if TYPE_CHECKING:
    from m3d.bench.config import BenchConfig
    from m3d.bench.slices_clip import SlicesClip

DESCRIPTION = """\
Ask a model all that a config asks of the records of a store, and its blind twin the same. Every scan is looked at once
and its questions are answered together. Answers are on disk batch by batch: stopped or killed, the same command goes on
where it was. Scoring is a second step, without the model: `m3d bench score DIR`.
"""
EPILOG = """\
A config (see configs/bench/):
  split: test                       of the store
  blind: zeros                      the twin sees no voxel; shuffled: another patient's; null: no twin
  batch: 16                         answers written at once about one scan
  scans: {kind: openkbp, root: PATH}    judge masks and boxes on the scans' own grid; without it on the store's
  tasks:
    report: {max_new_tokens: 768}
    vqa.closed: {most: 2000}        drawn with the seed
    seg.sem: {datasets: ["M3D-Seg:CT-ORG"], names: [liver]}
    seg.ref: {prompts: [text, point, text+box, clicks]}    each a row of its own; also points, scribble, slice_box, mask

examples:
  m3d bench run configs/bench/derived.yaml --data stores/openkbp --out bench/tiny split=validation
  m3d bench run configs/bench/derived.yaml --data stores/openkbp --out bench/tiny --nproc 4
  m3d bench run configs/bench/m3d_bench.yaml --model lamed --data stores/m3d --clip clip --out bench/lamed
  torchrun --nproc-per-node 8 -m m3d.cli bench run ...      then m3d bench score DIR, which reads what all wrote
"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the command's own arguments."""
    parser.add_argument("config", type=Path, metavar="CONFIG", help="YAML: tasks, split, blind, scans")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="values that replace the config's")
    group = parser.add_argument_group("what is measured, and on what")
    group.add_argument("--model", default="m3d-tiny", metavar="NAME_OR_PATH", help="a bundled model or a checkpoint")
    group.add_argument("--data", type=Path, metavar="STORE", required=True, help="a store of `m3d data prepare`")
    group.add_argument("--clip", metavar="PATH", help="a folder of pretrain_clip, for the task retrieval")
    group.add_argument(
        "--open-clip", metavar="MODEL", help="retrieval by a 2D CLIP over ten slices: open_clip's name, or a folder"
    )
    group.add_argument("--pretrained", type=Path, metavar="FILE", help="the weights of --open-clip's model")
    group = parser.add_argument_group("work")
    group.add_argument("--device", choices=DEVICES, default="auto", help="auto takes CUDA, then MPS, then the CPU")
    group.add_argument("--nproc", type=count(1), default=1, metavar="N", help="processes, each with its share of scans")


def run(arguments: argparse.Namespace) -> int:
    """Ask; in several processes, ask each for its share."""
    from m3d.bench.config import BenchConfig

    if arguments.out is None:
        raise ValueError("say where the answers go: --out DIR")
    config = load_config(BenchConfig, arguments.config, arguments.overrides)
    rank, world = (int(os.environ.get(name, default)) for name, default in (("RANK", "0"), ("WORLD_SIZE", "1")))
    if arguments.nproc > 1 and world == 1:
        _begin(arguments, config)
        _in_processes(arguments.nproc)
    else:
        _ask(arguments, config, rank, world)
        if world > 1:
            return 0
    _finish(arguments)
    return 0


def _begin(arguments: argparse.Namespace, config: BenchConfig) -> Path | None:
    """See that all that is needed is there, and that this folder holds no other run.

    Gives the model's folder; None where nothing is asked but retrieval, which has a model of its own.
    """
    from m3d.bench.prompted import check_model
    from m3d.bench.run import begin
    from m3d.inference.checkpoints import resolve
    from m3d.models.config import M3DConfig

    folder = resolve(arguments.model) if set(config.tasks) - {"retrieval"} else None
    if "retrieval" in config.tasks and (arguments.clip is None) == (arguments.open_clip is None):
        raise ValueError("the task retrieval needs --clip FOLDER or --open-clip MODEL; or leave the task out")
    if not (arguments.data / "records.jsonl").is_file():
        raise FileNotFoundError(f"{arguments.data}: no store of `m3d data prepare` is there")
    if folder is not None:
        check_model(config, M3DConfig.from_pretrained(folder))
    begin(arguments.out, _about(arguments, config, folder))
    return folder


def _ask(arguments: argparse.Namespace, config: BenchConfig, rank: int, world: int) -> None:
    """This process's share: what the language model says, then what retrieval needs."""
    import torch

    import m3d
    from data_prep.preprocess import Preprocess
    from m3d.bench.cases import find_cases
    from m3d.bench.run import ask_cases

    if world > 1:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // world))
    torch.set_flush_denormal(True)
    folder = _begin(arguments, config)
    cases = find_cases(config, arguments.data, None if folder is None else Preprocess.read(folder))
    if folder is not None:
        model = m3d.load(folder, device=_device(arguments.device))
        ask_cases(model, cases, config, arguments.out, rank=rank, world=world)
    if "retrieval" in config.tasks:
        from m3d.bench.retrieval import run_retrieval

        asked = [(case.stored, record) for case in cases for record in case.records if record.task == "retrieval"]
        device = _device(arguments.device)
        run_retrieval(asked, _embedder(arguments, device), arguments.out, shard=(rank, world), device=device)


def _embedder(arguments: argparse.Namespace, device: str) -> Path | SlicesClip:
    if arguments.open_clip is None:
        from m3d.recipes.checkpoints import model_folder

        return model_folder(arguments.clip)
    from m3d.bench.slices_clip import SlicesClip
    from m3d.inference.load import pick_device

    return SlicesClip.load(arguments.open_clip, arguments.pretrained, device=pick_device(device))


def _device(name: str) -> str:
    """Each process on a machine takes its own GPU."""
    local = os.environ.get("LOCAL_RANK")
    if local is None or name not in ("auto", "cuda"):
        return name
    import torch

    return f"cuda:{int(local) % torch.cuda.device_count()}" if torch.cuda.is_available() else name


def _in_processes(nproc: int) -> None:
    """Run this very command ``nproc`` times, each with its rank.

    Raises:
        ChildProcessError: One of them failed; what the others answered is kept.
    """
    shared = {**os.environ, "WORLD_SIZE": str(nproc)}
    command = [sys.executable, "-m", "m3d.cli", *sys.argv[1:]]
    children = [
        subprocess.Popen(command, env=shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)}) for rank in range(nproc)
    ]
    try:
        while any(child.poll() is None for child in children) and not any(child.poll() for child in children):
            time.sleep(0.2)
    finally:
        for child in children:
            if child.poll() is None:
                child.terminate()
    codes = [child.wait() for child in children]
    failed = [rank for rank, code in enumerate(codes) if code > 0] or [rank for rank, code in enumerate(codes) if code]
    if failed:
        raise ChildProcessError(
            f"process {', '.join(map(str, failed))} of {nproc} failed, see above; "
            "what was answered is kept: mend it and run the same command again"
        )


def _about(arguments: argparse.Namespace, config: BenchConfig, folder: Path | None) -> dict[str, Any]:
    """What ``run.json`` says: the model, the data and the settings; ``where`` is for this machine alone."""
    from data_prep.store import file_sha256
    from m3d.bench.kinds import TEXT
    from m3d.bench.simulated import SIMULATION
    from m3d.recipes.checkpoints import code_version, versions

    pointed = any(task.prompts != (TEXT,) for task in config.tasks.values())
    settings = json.loads(json.dumps(asdict(config)))
    scans, clip = settings.pop("scans"), _clip_facts(arguments)
    del settings["root"]
    return {
        "schema": "m3d.bench.run/1",
        "model": _model_facts(folder, clip),
        "clip": clip,
        "data": {
            "name": arguments.data.absolute().name,
            "records_sha256": file_sha256(arguments.data / "records.jsonl"),
        },
        "grid": "store" if scans is None else "scan",
        "config": settings,
        **({"simulation": SIMULATION} if pointed else {}),
        "where": {
            "config": str(find_config(arguments.config).absolute()),
            "data": str(arguments.data.absolute()),
            "scans": scans,
            "root": str(Path(config.root).absolute()),
        },
        "machine": {"packages": versions(), "commit": code_version()},
    }


def _model_facts(folder: Path | None, clip: dict[str, str | None] | None) -> dict[str, str | None]:
    """Which model answers; of retrieval alone, the one that embeds."""
    from m3d.recipes.checkpoints import fingerprint

    if folder is not None:
        return {"id": folder.name, "fingerprint": fingerprint(folder)}
    assert clip is not None
    return {"id": clip["name"], "fingerprint": clip["sha256"]}


def _clip_facts(arguments: argparse.Namespace) -> dict[str, str | None] | None:
    """Which model embeds, without where it lies; `m3d.bench.embeddings` holds a run to its weights."""
    from data_prep.store import file_sha256
    from m3d.recipes.checkpoints import parent_facts

    if arguments.clip is not None:
        return {**parent_facts({"clip": arguments.clip})["clip"]}
    if arguments.open_clip is None:
        return None
    weights = arguments.pretrained
    return {"name": Path(arguments.open_clip).name, "sha256": None if weights is None else file_sha256(weights)}


def _finish(arguments: argparse.Namespace) -> None:
    from m3d.bench.predictions import UNPROMPTABLE, gather

    found = gather(arguments.out)
    failures = [one.failure for one in found.values() if one.sight == "seeing" and one.failure is not None]
    failed = sum(not failure.startswith(UNPROMPTABLE) for failure in failures)
    seconds = sum(one.seconds or 0.0 for one in found.values())
    if arguments.json:
        counts = {"answers": len(found), "failed": failed, "not_promptable": len(failures) - failed}
        say_json({"out": str(arguments.out), **counts, "seconds": round(seconds, 1)})
        return
    said = f"{len(found)} answers in {arguments.out}, {failed} of those that see failed"
    if len(failures) > failed:
        said += f", {len(failures) - failed} have nothing to point at"
    say(f"{said}; {seconds:.0f} s of asking")
    note(f"next: m3d bench score {arguments.out}")
