"""LoRA adapters alone, as peft keeps them: on the language model that a user has already, whatever else learned beside.

::

    adapter_config.json adapter_model.safetensors   LoRA, and the rows of our own tokens, as peft's token adapters
    tokenizer*                                      with our tokens
    m3d/                                            config, preprocess, recipe, manifest, and m3d_parts.safetensors:
                                                    vision tower, perceiver, mask head, whatever is no language model

A trained stage that left out its language model has all of it (m3d/recipes/checkpoints.py); here it gets the names by
which the language model knows itself.
"""

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from torch import Tensor

from m3d.export.folders import copy_files, mark, whole_folder, without_paths
from m3d.export.reference import ALONG, Exported
from m3d.models import M3DConfig
from m3d.models.fold import State
from m3d.models.token_rows import LEARNED
from m3d.models.weights import read_weights, write_weights
from m3d.recipes.checkpoints import MANIFEST, RECIPE, read_manifest
from m3d.recipes.handover import LANGUAGE, LOW_RANK, LOW_RANK_CONFIG, PARTS, PEFT, kind_of, read_lora

BESIDE, BESIDE_STEM = "m3d", "m3d_parts"
ROWS = "token_adapter.trainable_tokens_delta"
A, B = ".lora_A.weight", ".lora_B.weight"


def export_peft(source: Path, folder: Path, *, force: bool = False) -> Exported:
    """A stage's LoRA on the language model as peft's own folder, and all else that it trained beside it.

    Raises:
        ValueError: The checkpoint has no LoRA on its language model; whole ones have it folded in.
    """
    if kind_of(source) != "parts" or not (source / LOW_RANK_CONFIG).is_file():
        raise ValueError(
            f"{source.name} has no LoRA adapters: they were folded into its weights, or it never had any; "
            "name the output of the stage that trained them (its `model` has adapter_config.json)"
        )
    low_rank, rows, parts = _split(source)
    lora, _ = read_lora(source)
    targets = sorted({name.removesuffix(A) for name in low_rank if name.endswith(A)})
    if not targets:
        raise ValueError(
            f"{source.name} has LoRA on other parts than its language model; there is no peft folder of it"
        )
    base, ids = _base_name(source), _row_ids(M3DConfig.from_pretrained(source))
    described = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=targets,
        task_type="CAUSAL_LM",
        base_model_name_or_path=base,
        inference_mode=True,
        trainable_token_indices={owner.rpartition(".")[2]: ids for owner in rows} or None,
    )
    adapter = {PEFT + name: tensor for name, tensor in low_rank.items()}
    adapter |= {f"{PEFT}{owner}.{ROWS}": tensor for owner, tensor in rows.items()}
    with whole_folder(folder, force=force) as partial:
        described.save_pretrained(str(partial))
        write_weights(adapter, partial, stem=LOW_RANK)
        copy_files(source, partial, tuple(name for name in ALONG if name != "preprocess.json"))
        (partial / BESIDE).mkdir()
        copy_files(source, partial / BESIDE, ("preprocess.json", RECIPE, MANIFEST))
        (partial / BESIDE / "config.json").write_bytes(without_paths(source / "config.json"))
        write_weights(parts, partial / BESIDE, stem=BESIDE_STEM)
        notes = _notes(base, rows, parts)
        (partial / "README.md").write_text(_readme(source.name, base, notes), encoding="utf-8")
        mark(partial, source, "peft", notes=notes)
    return Exported(folder, len(adapter) + len(parts), tuple(notes))


def _split(source: Path) -> tuple[State, State, State]:
    """LoRA of the language model, its learned rows by table, and the other parts with LoRA of their own folded in."""
    stored = read_weights(source, PEFT, pattern=f"{LOW_RANK}*.safetensors")
    low_rank = {name.removeprefix(LANGUAGE): one for name, one in stored.items() if name.startswith(LANGUAGE)}
    state = read_weights(source, pattern=f"{PARTS}*.safetensors")
    rows = {
        name.removeprefix(LANGUAGE).removesuffix(f".{LEARNED}"): tensor
        for name, tensor in state.items()
        if name.startswith(LANGUAGE)
    }
    parts = {name: tensor for name, tensor in state.items() if not name.startswith(LANGUAGE)}
    lora, _ = read_lora(source)
    for name in (one for one in stored if one.endswith(A) and not one.startswith(LANGUAGE)):
        owner = name.removesuffix(A)
        parts[f"{owner}.weight"] = _folded(
            parts[f"{owner}.weight"], stored[name], stored[owner + B], lora.alpha / lora.rank
        )
    return low_rank, rows, parts


def _folded(weight: Tensor, down: Tensor, up: Tensor, scaling: float) -> Tensor:
    with torch.no_grad():
        return (weight.float() + scaling * (up.float() @ down.float())).to(weight.dtype)


def _row_ids(config: M3DConfig) -> list[int]:
    return [getattr(config, f"{name}_token_id") for name in ("image", "box_start", "box_end", "seg")]


def _base_name(source: Path) -> str | None:
    """What the language model is called that the checkpoint left out, where its manifest knows."""
    parents: dict[str, Any] = (read_manifest(source) or {}).get("parents") or {}
    name = (parents.get("language_model") or {}).get("name")
    return None if name is None else str(name)


def _notes(base: str | None, rows: State, parts: State) -> list[str]:
    there = sorted({name.partition(".")[0] for name in parts})
    learned = f"the rows of our four tokens in {', '.join(sorted(rows))} are token adapters of peft" if rows else (
        "the rows of our four tokens did not learn; a tokenizer's new rows are what the base gives them"
    )  # fmt: skip
    return [
        f"the adapter belongs on {base or 'its language model'}, resized to the tokenizer's length first (README.md)",
        learned,
        f"{', '.join(there)} are no part of a peft adapter: {BESIDE}/{BESIDE_STEM}.safetensors has them",
    ]


def _readme(name: str, base: str | None, notes: list[str]) -> str:
    return f"""# LoRA adapters of {name}

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("THIS_FOLDER")
base = AutoModelForCausalLM.from_pretrained("{base or "BASE"}")  # folder or name of that model
base.resize_token_embeddings(len(tokenizer))
model = PeftModel.from_pretrained(base, "THIS_FOLDER")
```

What to know:

{chr(10).join(f"- {note}" for note in notes)}

This adapter alone does not see: without the parts in `{BESIDE}/` it is a language model. `m3d train` with
`stage: merge` makes a whole model of the checkpoint that this was made of. Written by `m3d export`. For research, not
for clinical use.
"""
