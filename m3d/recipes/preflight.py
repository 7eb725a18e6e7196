"""What can be known to fail is told before a model is built: folders, stores, batch sizes, engines."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

from data_prep.preprocess import Preprocess
from data_prep.store import Store
from m3d.config import config_root
from m3d.recipes.chain import load
from m3d.recipes.registry import sizes_alone
from m3d.train.contrastive import refuse_accumulation
from m3d.train.engines import Engine
from m3d.train.optim import OptimConfig


def check(config: Any, processes: int = 1) -> None:  # noqa: ANN401 - any recipe's dataclass
    """Refuse what could only fail later; of a chain, in every stage.

    Raises:
        FileNotFoundError: A store, a checkpoint or an engine's file is not there.
        ValueError: Sizes or settings do not go together.
        ModuleNotFoundError: The engine needs a package that is not installed.
    """
    if config.stage != "chain":
        _check_stage(config, processes, set())
        return
    made: set[Path] = set()
    for _, link in load(config):
        _check_stage(link, processes, made)
        made |= {Path(link.output), Path(link.output) / "model"}


def _check_stage(config: Any, processes: int, made: Collection[Path]) -> None:  # noqa: ANN401
    """One stage; what earlier ones will have ``made`` need not be there yet."""
    named = {value: where for where, value in settings(config) if isinstance(value, str)}
    engine, optim = getattr(config, "engine", None), getattr(config, "optim", None)
    if isinstance(engine, Engine):
        check_engine(engine, processes)
    if isinstance(optim, OptimConfig):
        optim.accumulate(processes)
        if config.stage == "pretrain_clip":
            refuse_accumulation(optim.batch, optim.micro_batch, processes)
    check_stores(stores_of(config))
    for role, folder in parents_of(config).items():
        if Path(folder) not in made:
            check_folder(Path(folder), named.get(folder, role))


def parents_of(config: Any) -> dict[str, str]:  # noqa: ANN401
    """The folders that a stage begins from, by role."""
    found = config.parents() if hasattr(config, "parents") else {}
    return {role: folder for role, folder in found.items() if folder is not None}


def settings(config: Any, where: str = "") -> Iterator[tuple[str, Any]]:  # noqa: ANN401
    """Every setting of a recipe with its dotted name, groups before what is in them."""
    for field in dataclasses.fields(config):
        name, value = f"{where}{field.name}", getattr(config, field.name)
        yield name, value
        if dataclasses.is_dataclass(value):
            yield from settings(value, f"{name}.")
        elif isinstance(value, list | tuple):
            for number, one in enumerate(value):
                if dataclasses.is_dataclass(one):
                    yield from settings(one, f"{name}.{number}.")


def stores_of(config: Any) -> list[Path]:  # noqa: ANN401
    """The stores that a recipe reads; a setting ``store`` or ``stores``, or ``root`` of an entry of ``stores``."""
    found: list[Path] = []
    for where, value in settings(config):
        parts = where.split(".")
        if parts[-1] in ("store", "stores") or (parts[-1] == "root" and "stores" in parts):
            many = value if isinstance(value, list | tuple) else [value]
            found += [Path(one) for one in many if isinstance(one, str | Path)]
    return found


def check_stores(stores: Sequence[Path]) -> Preprocess | None:
    """How the stores were prepared, all alike.

    Raises:
        FileNotFoundError: One is not there.
        ValueError: They were prepared differently.
    """
    first: tuple[Path, Preprocess] | None = None
    for root in stores:
        if not (root / "store.json").is_file():
            raise FileNotFoundError(f"{root}: no store there (store.json); make one with `m3d data prepare`")
        preprocess = Store(root).preprocess
        if first is not None and preprocess != first[1]:
            raise ValueError(f"{root} and {first[0]} were prepared differently; compare their preprocess.json")
        first = first or (root, preprocess)
    return None if first is None else first[1]


def check_folder(folder: Path, name: str) -> None:
    """Whether a checkpoint, or a language model, is whole enough to be read."""
    place = next((one for one in (folder, folder / "model") if (one / "config.json").is_file()), None)
    if place is None and sizes_alone(folder) is not None:
        raise ValueError(f"{name}={folder} has sizes alone, for dry runs; give the folder of its weights: {name}=PATH")
    if not folder.is_dir():
        raise FileNotFoundError(f"{name}={folder}: no such folder; run the stage that makes it, or set {name}=PATH")
    if place is None:
        raise FileNotFoundError(f"{name}={folder}: no config.json in it; is the stage that makes it done?")
    if not any(place.glob("*.safetensors")):
        raise FileNotFoundError(f"{name}={folder}: no .safetensors in it; pickled weights are not read")
    _check_index(place, name)


def _check_index(folder: Path, name: str) -> None:
    """Every file that the index of sharded weights names."""
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return
    named = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    missing = sorted(one for one in named if not (folder / one).is_file())
    if missing:
        raise FileNotFoundError(f"{name}={folder}: {missing[0]} is missing ({len(missing)} of {len(named)} files)")


def check_engine(engine: Engine, processes: int) -> None:
    """Whether the engine can run here in so many processes."""
    if engine.zero_stage and importlib.util.find_spec("deepspeed") is None:
        raise ModuleNotFoundError(f"engine={engine.name} needs DeepSpeed: pip install 'm3d-lamed[train]'")
    if engine.deepspeed is not None:
        path = Path(engine.deepspeed)
        if not path.is_file() and not (config_root() / path).is_file():
            known = ", ".join(sorted(one.name for one in (config_root() / "engines").glob("zero*.json")))
            raise FileNotFoundError(f"engine.deepspeed={path}: no such file; shipped in engines/: {known}")
    if engine.name == "single" and processes > 1:
        raise ValueError(f"engine=single is one process, {processes} were asked for; use --engine ddp, zero2 or zero3")
    if engine.name == "fsdp" and engine.on_cpu:
        raise ValueError("engine=fsdp needs GPUs: accelerate does not shard on the CPU; use zero3 or ddp there")
