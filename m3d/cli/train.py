"""`m3d train CONFIG`: run a stage of training, or say what it would need; one process, or many."""

from __future__ import annotations

import argparse
import dataclasses
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from m3d.cli.common import note, say_error, say_json
from m3d.config import load_config
from m3d.recipes.registry import STAGES, read_values, recipe, stage_of

ENGINES = ("single", "ddp", "zero2", "zero3", "fsdp")
DESCRIPTION = """\
Run the stage that a config's `stage:` names. Whatever is killed goes on with --resume, to the bit on a CPU.
Wrong keys, missing files and impossible sizes are told before a model is built; --dry-run says what
it would need, from configs alone.

stages (and where the published numbers come from):
""" + "\n".join(f"  {name:<16}{stage.does}\n{'':18}[{stage.source}]" for name, stage in STAGES.items())
EPILOG = """\
Every number in configs/lamed/ names its source: a section of the paper (arXiv 2404.00578) or a released script, and
both where they disagree. configs/tiny/ trains the bundled model on two CPU cores.

engines: single (one process), ddp (a copy in each), zero2 and zero3 (DeepSpeed: gradients and optimizer shared out, and
weights too), fsdp (torch's, GPUs only). --nproc N without --engine is ddp. configs/engines/ has DeepSpeed's settings:
engine.deepspeed=engines/zero3-8xa100.json.

examples:
  m3d train configs/tiny/chain.yaml                            every stage of the bundled model, one after the other
  m3d train configs/lamed/instruct.yaml --dry-run              parameters, tokens, memory per GPU, steps, data mix
  m3d train configs/lamed/instruct-llama3.1-8b.yaml --dry-run --json
  m3d train configs/lamed/align.yaml data.stores=[stores/m3d] init.language_model=/models/Llama-2-7b --nproc 8
  m3d train configs/lamed/instruct.yaml --nproc 8 --engine zero2 --set optim.micro_batch=4
  m3d train configs/lamed/instruct.yaml --nproc 8 --resume     where it was stopped

the same with other launchers, on one machine:
  torchrun --standalone --nproc-per-node 8 -m m3d.cli train configs/lamed/instruct.yaml --engine zero2
  deepspeed --num_gpus 8 --no_local_rank --module m3d.cli train configs/lamed/instruct.yaml --engine zero2

and on four machines of a SLURM cluster, 32 GPUs, in an sbatch script:
  #SBATCH --nodes=4 --ntasks-per-node=1 --gpus-per-node=8 --cpus-per-task=64
  head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
  srun torchrun --nnodes "$SLURM_NNODES" --nproc-per-node 8 --rdzv-id "$SLURM_JOB_ID" --rdzv-backend c10d \\
    --rdzv-endpoint "$head:29500" -m m3d.cli train configs/lamed/instruct.yaml --engine zero3 --resume
"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the command's own arguments."""
    parser.add_argument(
        "config", type=Path, metavar="CONFIG", help="YAML with a `stage:`; shipped ones are found by name"
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="values that replace the config's")
    group = parser.add_argument_group("training")
    group.add_argument("--set", action="append", default=[], metavar="key=value", help="the same as key=value")
    group.add_argument("--nproc", type=int, metavar="N", help="start N processes on this machine, one a GPU")
    group.add_argument("--engine", choices=ENGINES, help="how they share the work (default: the config's)")
    group.add_argument("--resume", action="store_true", help="go on from the last checkpoint of the output folder")
    group.add_argument("--dry-run", action="store_true", help="build nothing, say what it would need, and stop")


def run(arguments: argparse.Namespace) -> int:
    """Check, then plan, launch or train."""
    overrides = _overrides(arguments)
    chosen = recipe(stage_of(arguments.config, overrides))
    config = load_config(chosen.Config, arguments.config, overrides)
    processes = _processes(arguments.nproc)
    if arguments.dry_run:
        return _dry_run(config, arguments)
    from m3d.recipes.preflight import check
    from m3d.train import engines

    check(config, processes)
    if processes > 1 and arguments.nproc is not None:
        flags = [f"--{name}" for name in ("resume", "traceback") if getattr(arguments, name)]
        return engines.launch("m3d.cli", ["train", str(arguments.config), *overrides, *flags], processes=processes)
    _speak()
    try:
        chosen.main(config, resume=arguments.resume)
        engines.leave()
    except FloatingPointError as error:  # a loss that is no number, or explodes; the ids are written out
        if arguments.traceback:
            raise
        say_error(str(error))
        return 1
    return 0


def _speak() -> None:
    """What a stage says of itself, with the time, from the first process; warnings have a way of their own."""
    if int(os.environ.get("RANK", "0")) > 0:
        return
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    handler.addFilter(lambda record: record.levelno < logging.WARNING)
    ours = logging.getLogger("m3d")
    ours.setLevel(logging.INFO)
    ours.addHandler(handler)


def _overrides(arguments: argparse.Namespace) -> list[str]:
    """All of ``key=value``; the options that stand for one come last."""
    found = [*arguments.overrides, *arguments.set]
    if arguments.out is not None:
        found.append(f"output={arguments.out}")
    if arguments.device != "auto":
        found.append(f"engine.device={arguments.device}")
    engine = arguments.engine
    if engine is None and (arguments.nproc or 1) > 1 and _is_single(arguments.config, found):
        engine = "ddp"
        note(f"--nproc {arguments.nproc}: engine=ddp, a copy of the model in each process")
    if engine is not None:
        found.append(f"engine.name={engine}")
        file = str(_engine_of(arguments.config).get("deepspeed") or "")
        if file and engine not in file and not any(word.startswith("engine.deepspeed=") for word in found):
            from m3d.train.engines import sibling

            found.append(f"engine.deepspeed={sibling(file, engine) or 'null'}")
    return found


def _is_single(path: Path, overrides: Sequence[str]) -> bool:
    """Whether a config says one process, or nothing; the stages of a chain say it themselves."""
    if any(word.startswith("engine.name=") for word in overrides) or read_values(path).get("stage") == "chain":
        return False
    return bool(_engine_of(path).get("name", "single") == "single")


def _engine_of(path: Path) -> dict[str, Any]:
    """The ``engine:`` of a config as it is written."""
    values = read_values(path).get("engine") or {}
    return values if isinstance(values, dict) else {}


def _processes(nproc: int | None) -> int:
    """How many processes train: those of ``--nproc``, or those that a launcher has started."""
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if nproc is not None and nproc < 1:
        raise ValueError(f"--nproc {nproc} must be 1 or more")
    if nproc is not None and started > 1:
        raise ValueError(f"--nproc {nproc} inside a launcher that has started {started} processes; leave --nproc out")
    return nproc or started


def _dry_run(config: Any, arguments: argparse.Namespace) -> int:  # noqa: ANN401 - each recipe has its own
    from m3d.recipes.dry_run import plan

    found = plan(config, arguments.config)
    if arguments.json:
        say_json(dataclasses.asdict(found) | {"config": str(arguments.config)})
        return 0
    from m3d.cli.train_plan import show

    show(found, str(arguments.config))
    return 0
