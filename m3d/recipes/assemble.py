"""A language model from a folder, our tokens in it, and the whole model around it.

A language model of billions of weights is read once, in its own type; the other parts are made where it stands.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from m3d.models import M3DConfig, M3DForConditionalGeneration
from m3d.models.processing import TokenIds, add_m3d_tokens


def load_language_model(
    folder: Path, dtype: torch.dtype = torch.float32
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A causal LM and its tokenizer from a local folder; safetensors only, no code of strangers."""
    if not any(folder.glob("*.safetensors")):
        raise FileNotFoundError(f"{folder}: no .safetensors; pickled weights are not read, save them again with it")
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, local_files_only=True, use_safetensors=True, output_loading_info=True
    )
    model, info = loaded
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info[kind]:
            names = sorted(map(str, info[kind]))
            raise ValueError(f"{folder}: {len(names)} {kind.replace('_', ' ')}, such as {names[0]}; is it whole?")
    return model, AutoTokenizer.from_pretrained(folder, local_files_only=True)


def teach_tokens(language_model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> TokenIds:
    """Our four tokens; those that are new get rows, each the mean of the rows before (REFERENCE A1.3).

    A tokenizer without padding pads with its unknown token (LLaMA-2, as published), else with its end of sequence.
    """
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    known = len(tokenizer)
    ids = add_m3d_tokens(tokenizer)
    if len(tokenizer) > len(_weight(language_model.get_input_embeddings())):
        language_model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    new = [row for row in range(known, len(tokenizer))]
    for table in (language_model.get_input_embeddings(), language_model.get_output_embeddings()):
        if new and table is not None:
            weight = _weight(table)
            with torch.no_grad():
                weight[new] = weight[:known].float().mean(dim=0).to(weight.dtype)
    return ids


def _weight(table: nn.Module) -> Tensor:
    weight = table.weight
    assert isinstance(weight, Tensor)
    return weight


def around(config: M3DConfig, language_model: PreTrainedModel) -> M3DForConditionalGeneration:
    """The model that ``config`` describes around a language model; its other parts are drawn by chance."""
    with torch.device("meta"):
        model = M3DForConditionalGeneration(config)
    model.language_model = language_model
    for part in (model.vision_tower, model.perceiver, model.seg_head, model.seg_projector, model.box_head):
        if part is not None:
            part.to_empty(device="cpu")
            with torch.no_grad():
                part.apply(model._init_weights)
    model.generation_config = GenerationConfig.from_model_config(config)
    return model
