"""What stages hand to each other: a folder of weights, tokenizer, preprocess, recipe and manifest.

::

    config.json preprocess.json tokenizer*        what and how
    model*.safetensors                            everything: such a folder `m3d.load` reads
    parts.safetensors                             or all but the language model, which stays where it came from,
    adapter_model.safetensors adapter_config.json   with its LoRA, as peft names it
    recipe.yaml manifest.json                     how it was made; no paths of the machine, no pickles

A trained stage's output holds it as ``model``, beside what training goes on from (`m3d.train.checkpoints`).
"""

import hashlib
import json
import platform
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml

from data_prep.atomic import atomic_path
from data_prep.store import Store
from m3d.config import load_config
from m3d.inference.checkpoints import sampled_weights
from m3d.recipes.registry import recipe

MANIFEST, RECIPE, BEGUN, FORMAT = "manifest.json", "recipe.yaml", "begun.json", "m3d.checkpoint/1"
PACKAGES = ("torch", "transformers", "peft", "monai", "numpy", "safetensors", "deepspeed")
FREE_TO_CHANGE = ("lr", "lr_by_part", "clip", "explode", "micro_batch", "save_every", "eval_every")
"""Of ``optim``: a run that was stopped goes on with others, as `FloatingPointError` and the dry run advise."""
OF_THE_MACHINE = ("output", "root", "engine", "device", "workers", "log_every", "keep", "cache_gib")


def model_folder(path: Path | str) -> Path:
    """The checkpoint folder that a path means: itself, or ``model`` in the output of a stage.

    Raises:
        FileNotFoundError: There is none.
    """
    path = Path(path)
    for folder in (path, path / "model"):
        if (folder / "config.json").is_file():
            return folder
    raise FileNotFoundError(f"{path}: no checkpoint here (config.json); run the stage that makes it first")


def read_manifest(path: Path | str) -> dict[str, Any] | None:
    """The manifest of a checkpoint folder or a stage's output, if there is one."""
    for folder in (Path(path), Path(path) / "model"):
        if (folder / MANIFEST).is_file():
            found: dict[str, Any] = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
            return found
    return None


# -- the recipe, without the machine --------------------------------------------------------------------------------


def portable(value: Any) -> Any:  # noqa: ANN401 - whatever a config holds
    """A config's values without what belongs to the machine; of a path, the name alone is left."""
    if isinstance(value, Mapping):
        return {key: portable(one) for key, one in value.items() if key not in OF_THE_MACHINE}
    if isinstance(value, list | tuple):
        return [portable(one) for one in value]
    if isinstance(value, Path) or (isinstance(value, str) and ("/" in value or "\\" in value)):
        return Path(value).name
    return value


def recipe_of(config: Any) -> dict[str, Any]:  # noqa: ANN401 - any stage's dataclass
    """A stage's config as ``recipe.yaml`` has it."""
    found: dict[str, Any] = portable(asdict(config))
    return found


def config_hash(config: Any) -> str:  # noqa: ANN401
    """SHA-256 of the recipe: what changes the result changes it, a moved folder does not."""
    return _sha256(recipe_of(config))


def run_hash(config: Any) -> str:  # noqa: ANN401
    """SHA-256 of what a run that was stopped must have in common with the one that goes on."""
    found = {name: one for name, one in recipe_of(config).items() if name not in ("checkpointing", "samples_every")}
    if isinstance(optim := found.get("optim"), Mapping):
        found["optim"] = {name: one for name, one in optim.items() if name not in FREE_TO_CHANGE}
    return _sha256(found)


def _sha256(values: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


# -- the manifest ---------------------------------------------------------------------------------------------------


def data_facts(stores: Iterable[str | Path]) -> list[dict[str, Any]]:
    """What was learned from: for each store its size, and the SHA-256 of its two indexes.

    ``images.jsonl`` holds the SHA-256 of every scan's own voxels, so with ``records.jsonl`` all of the data is in it.
    """
    facts = []
    for store in map(Store, stores):
        digest = hashlib.sha256()
        for name in ("images.jsonl", "records.jsonl"):
            digest.update((store.root / name).read_bytes())
        sizes = {"images": len(store.images), "records": sum(len(one.lines) for one in store.records.images.values())}
        datasets = sorted({image.dataset for image in store.images.values()})
        facts.append({"store": store.root.name, "datasets": datasets, **sizes, "sha256": digest.hexdigest()})
    return facts


def fingerprint(folder: Path | str) -> str:
    """SHA-256 of a checkpoint's config, and of its `sampled_weights`."""
    folder, digest = model_folder(folder), hashlib.sha256()
    digest.update((folder / "config.json").read_bytes())
    for sample in sampled_weights(folder):
        digest.update(sample)
    return digest.hexdigest()


def parent_facts(folders: Mapping[str, str | None]) -> dict[str, dict[str, Any]]:
    """The checkpoints that a stage begins from, by their role: name, fingerprint, and whose weights they go back to."""
    return {
        role: {
            "name": _name(Path(folder)),
            "sha256": fingerprint(folder),
            "others": others_weights(read_manifest(folder), _name(Path(folder))),
        }
        for role, folder in folders.items()
        if folder
    }


def others_weights(manifest: Mapping[str, Any] | None, name: str) -> list[str]:
    """Whose weights a checkpoint goes back to that this package did not train; their licences hold for it, too.

    A folder without a manifest is somebody else's, ``name``; so is what was converted, or taken out of a package.
    """
    if manifest is None:
        return [name]
    if manifest.get("stage") in ("convert", "take_words"):
        return [str((manifest.get("source") or {}).get("name") or manifest.get("from") or name)]
    return sorted({other for parent in (manifest.get("parents") or {}).values() for other in parent.get("others", [])})


def _name(folder: Path) -> str:
    return folder.resolve().parent.name if folder.name == "model" else folder.resolve().name


def code_version() -> str | None:
    """The commit of the checkout that this runs from, where it is one; ``+`` where files have been changed."""
    package = Path(__file__).parents[2]
    try:
        top, *commit = _git(package, "rev-parse", "--show-toplevel", "HEAD").splitlines()
        if Path(top).resolve() != package.resolve():  # installed below somebody else's checkout
            return None
        return commit[0] + ("+" if _git(package, "status", "--porcelain", "-uno") else "")
    except (OSError, ValueError, IndexError):  # no git here, no checkout, no commit
        return None


def _git(folder: Path, *given: str) -> str:
    done = subprocess.run(["git", "-C", str(folder), *given], capture_output=True, text=True, check=False)
    return done.stdout.strip()


def versions() -> dict[str, str]:
    """Python and the packages that results depend on, as far as they are installed."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def begin_manifest(
    config: Any,  # noqa: ANN401 - any stage's dataclass
    *,
    stores: Sequence[str | Path] = (),
    parents: Mapping[str, str | None] | None = None,
    **more: Any,  # noqa: ANN401
) -> dict[str, Any]:
    """What is known of a stage before it runs; it is ``final`` when `finish_manifest` says so."""
    return {
        "format": FORMAT,
        "stage": config.stage,
        "final": False,
        "config_sha256": config_hash(config),
        "run_sha256": run_hash(config),
        "seed": getattr(config, "seed", None),
        "commit": code_version(),
        "packages": versions(),
        "data": data_facts(stores),
        "parents": parent_facts(parents or {}),
        **more,
    }


def write_manifest(folder: Path, facts: Mapping[str, Any]) -> None:
    """Write ``manifest.json``, whole or not at all."""
    with atomic_path(folder / MANIFEST) as temporary:
        temporary.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


def write_recipe(folder: Path, config: Any) -> None:  # noqa: ANN401
    """Write ``recipe.yaml``."""
    with atomic_path(folder / RECIPE) as temporary:
        temporary.write_text(yaml.safe_dump(recipe_of(config), sort_keys=False), encoding="utf-8")


def finish_manifest(output: Path, **facts: Any) -> dict[str, Any]:  # noqa: ANN401
    """Say in the manifest of a stage's output that the stage is done, with what was measured."""
    folder = model_folder(output)
    found = read_manifest(folder)
    assert found is not None, f"{folder} has no manifest to finish"
    found |= {"final": True, "wall_seconds": wall_seconds(output), "metrics": last_metrics(output), **facts}
    write_manifest(folder, found)
    return found


def wall_seconds(output: Path) -> float:
    """Seconds of all steps of a stage, resumed ones counted once, from its ``losses.jsonl``."""
    return round(float(sum(row.get("seconds", 0.0) for row in _rows(output / "losses.jsonl"))), 1)


def last_metrics(output: Path, window: int = 20) -> dict[str, float]:
    """The last evaluation of a stage, and its losses: the mean of the last ``window`` steps."""
    rows = _rows(output / "losses.jsonl")[-window:]
    names = [name for name in (rows[-1] if rows else {}) if not name.startswith("lr") and "/s" not in name]
    means = {
        name: sum(row[name] for row in rows if name in row) / sum(name in row for row in rows)
        for name in names
        if name not in ("step", "seconds", "epoch", "memory_gib")
    }
    evaluated = _rows(output / "evaluations.jsonl")[-1:]
    return means | {name: value for row in evaluated for name, value in row.items() if name.startswith("eval_")}


def _rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []


def begun(output: Path, config: Any, facts: Mapping[str, Any]) -> None:  # noqa: ANN401
    """Note what a stage's output is going to be; the same again changes nothing, nor do settings that are free.

    Raises:
        ValueError: The folder is that of another configuration, of other data or other weights to begin from.
    """
    known = _begun_facts(output)
    if known is not None and (why := _difference(known, facts, "run_sha256")):
        raise ValueError(f"{output} holds {why}; choose another output, or move that one away")
    output.mkdir(parents=True, exist_ok=True)
    write_recipe(output, config)
    with atomic_path(output / BEGUN) as temporary:
        temporary.write_text(json.dumps(dict(facts), indent=1) + "\n", encoding="utf-8")


def state_of(output: Path, facts: Mapping[str, Any]) -> str:
    """Whether a stage's output, to be made as ``facts`` say, is "done", "to do", or what else it is."""
    found = read_manifest(output)
    done = found is not None and bool(found.get("final"))
    known = _as_today(model_folder(output), found) if found is not None and done else _begun_facts(output)
    if known is None:
        return "to do"
    return _difference(known, facts, "config_sha256" if done else "run_sha256") or ("done" if done else "to do")


def _begun_facts(output: Path) -> dict[str, Any] | None:
    path = output / BEGUN
    if path.is_file():
        return _as_today(output, json.loads(path.read_text(encoding="utf-8")))
    found = read_manifest(output)
    return None if found is None else _as_today(model_folder(output), found)


def _as_today(folder: Path, facts: dict[str, Any]) -> dict[str, Any]:
    """With the hashes of a folder's recipe as it is read today: a setting that is newer has its default."""
    if not (folder / RECIPE).is_file():
        return facts
    try:
        config = load_config(recipe(facts["stage"]).Config, folder / RECIPE)
    except ValueError:  # it has a setting that is no more
        return facts
    return {**facts, "config_sha256": config_hash(config), "run_sha256": run_hash(config)}


def _difference(known: Mapping[str, Any], facts: Mapping[str, Any], which: str) -> str | None:
    """In what two stages' beginnings differ, as far as it changes what comes of them; ``which`` hash is compared."""
    if known.get(which) != facts[which]:
        return "a run of another configuration"
    if [one["sha256"] for one in known.get("data", [])] != [one["sha256"] for one in facts["data"]]:
        return "a run on other data"
    before, now = ({role: one["sha256"] for role, one in each["parents"].items()} for each in (known, facts))
    return None if before == now else "a run that began from other weights"
