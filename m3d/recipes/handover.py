"""Models in and out of checkpoint folders: whole, or all but the language model with its LoRA beside it."""

import json
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from m3d.models import M3DConfig, M3DForConditionalGeneration, M3DProcessor
from m3d.models.fold import BASE, LORA_A, LORA_B, State, plain, whole_state
from m3d.models.lora import ADAPTER, Lora, inject_at, lora_config, lora_layers
from m3d.models.token_rows import LEARNED, learn_rows
from m3d.models.weights import put, read_weights, write_weights
from m3d.recipes.assemble import around, load_language_model, teach_tokens
from m3d.recipes.checkpoints import fingerprint, read_manifest
from m3d.recipes.parts import MODULES, learned_row_ids, token_rows

Kind = Literal["whole", "parts"]
PARTS, LOW_RANK, LOW_RANK_CONFIG = "parts", "adapter_model", "adapter_config.json"
PEFT, LANGUAGE = "base_model.model.", "language_model."


def kind_of(folder: Path) -> Kind:
    """Whether a folder has everything, or left out the language model."""
    return "parts" if any(folder.glob(f"{PARTS}*.safetensors")) else "whole"


def save_model(
    folder: Path,
    model: M3DForConditionalGeneration,
    processor: M3DProcessor,
    *,
    kind: Kind = "whole",
    lora: Lora | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Write a model into an empty folder; ``whole`` folds LoRA and learned rows into plain tensors.

    Raises:
        ValueError: The model is only a shard of one.
    """
    state, lora = whole_state(model), lora or Lora()
    if kind == "whole":
        folded = plain(state, scaling=lora.alpha / lora.rank, rows=learned_row_ids(model))
        write_weights({name: _as(tensor, dtype) for name, tensor in folded.items()}, folder)
    else:
        _write_parts(folder, model, state, lora)
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    if model.generation_config is not None:
        model.generation_config.save_pretrained(folder)
    processor.save_pretrained(folder)


def _as(tensor: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
    return tensor.to(dtype) if dtype is not None and tensor.is_floating_point() else tensor


def _write_parts(folder: Path, model: nn.Module, state: State, lora: Lora) -> None:
    """Everything but the language model's own weights: its learned rows, LoRA by peft's names, the other parts."""
    low_rank = {name: tensor for name, tensor in state.items() if name.endswith((LORA_A, LORA_B))}
    others = {
        name.replace(BASE, ""): tensor
        for name, tensor in state.items()
        if name not in low_rank and (not name.startswith(LANGUAGE) or name.endswith("." + LEARNED))
    }
    if any(tensor.numel() == 0 for tensor in [*low_rank.values(), *others.values()]):
        raise ValueError("this is a shard of a model; gather it before it is saved")
    write_weights(others, folder, stem=PARTS)
    if low_rank:
        targets = sorted({name.rpartition(".lora_")[0] for name in low_rank})
        lora_config(targets, lora).save_pretrained(str(folder))
        peft_names = {PEFT + name.replace(f".{ADAPTER}.", "."): tensor for name, tensor in low_rank.items()}
        write_weights(peft_names, folder, stem=LOW_RANK)


def load_model(
    folder: Path, *, language_model: Path | None = None, dtype: torch.dtype = torch.float32
) -> tuple[M3DForConditionalGeneration, M3DProcessor]:
    """Read a checkpoint folder, as it was while it learned: with LoRA layers and learned rows where it has them.

    Raises:
        ValueError: Weights do not fit, or the language model that was left out is not given, or is another one.
    """
    processor = M3DProcessor.from_pretrained(folder)
    if kind_of(folder) == "parts":
        return _load_parts(folder, _base_of(folder, language_model), dtype), processor
    config = M3DConfig.from_pretrained(folder)
    model: Any = M3DForConditionalGeneration.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    model.language_model.to(dtype)  # it alone: what learns in full should be float32
    names = set(read_weights(folder))
    missing = sorted(set(whole_state(model)) - names)
    unexpected = sorted(names - set(model.state_dict()))
    if missing or unexpected:
        wrong = {"missing": missing, "unexpected": unexpected}
        found = [f"{len(some)} {kind}, such as {some[0]}" for kind, some in wrong.items() if some]
        raise ValueError(f"{folder}: the weights do not fit config.json ({'; '.join(found)})")
    assert model.config.model_type == config.model_type
    return model, processor


def _base_of(folder: Path, language_model: Path | None) -> Path:
    """The language model that a folder left out, checked to be the same."""
    known = ((read_manifest(folder) or {}).get("parents") or {}).get("language_model") or {}
    name = known.get("name", "its language model")
    if language_model is None:
        raise ValueError(f"{folder} left out {name}; give the folder of {name} as language_model")
    if known and fingerprint(language_model) != known["sha256"]:
        raise ValueError(f"{folder} was trained around {name}, and {language_model} is another language model")
    return language_model


def _load_parts(folder: Path, base: Path, dtype: torch.dtype) -> M3DForConditionalGeneration:
    config = M3DConfig.from_pretrained(folder)
    language_model, tokenizer = load_language_model(base, dtype)
    teach_tokens(language_model, tokenizer)
    if len(tokenizer) > config.text.vocab_size:
        raise ValueError(f"{base} has {len(tokenizer)} tokens, {folder} knows {config.text.vocab_size}")
    model = around(config, language_model)
    state = read_weights(folder, pattern=f"{PARTS}*.safetensors")
    learned = {name: tensor for name, tensor in state.items() if name.startswith(LANGUAGE)}
    for name in (one for one in MODULES if f"{one}." != LANGUAGE):
        module = getattr(model, name)
        own = {key.removeprefix(f"{name}."): tensor for key, tensor in state.items() if key.startswith(f"{name}.")}
        if module is not None:
            put(module, own, f"{folder}: {name}")
    if learned:
        learn_rows(model.language_model, token_rows(model))
        _copy(model, learned, folder)
    if (folder / LOW_RANK_CONFIG).is_file():
        _load_lora(model, folder)
    return model


def _load_lora(model: M3DForConditionalGeneration, folder: Path) -> None:
    lora, targets = read_lora(folder)
    inject_at(model, targets, lora)
    stored = read_weights(folder, PEFT, pattern=f"{LOW_RANK}*.safetensors")
    named = {name.removesuffix(".weight") + f".{ADAPTER}.weight": tensor for name, tensor in stored.items()}
    expected = {name for name in model.state_dict() if name.endswith((LORA_A, LORA_B))}
    if odd := sorted(expected ^ named.keys()):
        raise ValueError(f"{folder}: {len(odd)} LoRA tensors do not fit {LOW_RANK_CONFIG}, such as {odd[0]}")
    _copy(model, named, folder)
    assert lora_layers(model)


def read_lora(folder: Path) -> tuple[Lora, list[str]]:
    """Settings of a folder's LoRA, and the full names of the layers it lies on."""
    values = json.loads((folder / LOW_RANK_CONFIG).read_text(encoding="utf-8"))
    lora = Lora(rank=values["r"], alpha=values["lora_alpha"], dropout=values["lora_dropout"])
    return lora, sorted(values["target_modules"])


@torch.no_grad()
def _copy(model: nn.Module, tensors: State, folder: Path) -> None:
    own = model.state_dict()
    for name, tensor in tensors.items():
        if name not in own or own[name].shape != tensor.shape:
            raise ValueError(f"{folder}: {name} {tuple(tensor.shape)} has no place in the model of its config.json")
        own[name].copy_(tensor)
