"""Weights in and out of folders: safetensors alone, strictly, and with the names of what does not fit."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from m3d.models.fold import State

LARGEST_FILE = "5GB"
READABLE = 0o644


def read_weights(folder: Path, prefix: str = "", *, pattern: str = "*.safetensors") -> State:
    """All tensors of a folder whose names begin with ``prefix``, which is taken off.

    Raises:
        FileNotFoundError: The folder has no weights in safetensors.
        ValueError: A file is broken.
    """
    paths = sorted(folder.glob(pattern))
    if not paths:
        raise FileNotFoundError(f"{folder}: no {pattern}; weights are read from safetensors only, save them so")
    state: State = {}
    for path in paths:
        try:
            with safe_open(path, framework="pt") as file:
                names = [name for name in file.keys() if name.startswith(prefix)]
                state |= {name.removeprefix(prefix): file.get_tensor(name) for name in names}
        except SafetensorError as error:
            raise ValueError(f"{path} cannot be read ({error}); was the copy cut? Fetch it again") from None
    return state


def write_weights(state: Mapping[str, Tensor], folder: Path, *, stem: str = "model") -> None:
    """Write tensors as ``STEM.safetensors``, in several files with an index where they are large."""
    whole = {name: tensor.contiguous() for name, tensor in state.items()}
    plan = split_torch_state_dict_into_shards(
        whole, filename_pattern=f"{stem}{{suffix}}.safetensors", max_shard_size=LARGEST_FILE
    )
    for filename, names in plan.filename_to_tensors.items():
        save_file({name: whole[name] for name in names}, folder / filename, metadata={"format": "pt"})
        (folder / filename).chmod(READABLE)  # safetensors lets nobody but the writer read
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index, indent=1), encoding="utf-8")


def put(module: nn.Module, state: Mapping[str, Tensor], where: str, *, optional: Iterable[str] = ()) -> None:
    """Load every tensor of a module, strictly, in the module's own types; ``optional`` names may be missing.

    Raises:
        ValueError: Something is missing, unexpected or of another shape; the message names the first of each.
    """
    own = module.state_dict()
    missing = sorted(own.keys() - state.keys() - set(optional))
    unexpected = sorted(state.keys() - own.keys())
    misshapen = sorted(name for name in own.keys() & state.keys() if own[name].shape != state[name].shape)
    wrong = {"missing": missing, "unexpected": unexpected, "of another shape": misshapen}
    found = [f"{len(names)} {kind}, such as {names[0]}" for kind, names in wrong.items() if names]
    if found:
        raise ValueError(f"{where}: the weights do not fit ({'; '.join(found)}); they belong to another model")
    with torch.no_grad():
        module.load_state_dict(dict(state), strict=not optional)
