"""Tokenizers of released folders: their own tokens and ids, read without their code."""

import importlib.util
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from m3d.models.processing import BOX_END, BOX_START, IMAGE_TOKEN, SEG_TOKEN, TokenIds

FILES = (
    *("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.txt", "vocab.json", "merges.txt"),
)
SPACE = "\N{LOWER ONE EIGHTH BLOCK}"
SENTENCES = "tokenizer.model"
"""The released LaMed folders have a sentencepiece model alone; converted ones keep it for those who export again."""


def read_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder; only its word lists and settings are looked at.

    Raises:
        FileNotFoundError: The folder has none.
        ModuleNotFoundError: It is a sentencepiece model, and what reads those is not installed.
        ValueError: Its files are broken, or its added tokens have other ids than the folder says.
    """
    there = [name for name in FILES if (folder / name).is_file()]
    if not {"tokenizer.json", SENTENCES, "vocab.txt", "vocab.json"} & set(there):
        raise FileNotFoundError(
            f"{folder} has no tokenizer (tokenizer.json, tokenizer.model or vocab.txt); name the folder that has it: "
            "--beside FOLDER"
        )
    if "tokenizer.json" not in there and SENTENCES in there:
        for module, package in (("sentencepiece", "sentencepiece"), ("google.protobuf", "protobuf")):
            if not _installed(module):
                raise ModuleNotFoundError(
                    f"{folder.name}/{SENTENCES} needs {package} to be read: pip install 'm3d-lamed[convert]'"
                )
    with tempfile.TemporaryDirectory() as room:
        for name in there:
            shutil.copyfile(folder / name, Path(room) / name)
        _without_code(Path(room) / "tokenizer_config.json")
        try:
            tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(room, local_files_only=True)
        except (ValueError, KeyError, OSError, TypeError) as error:
            raise ValueError(f"{folder}: the tokenizer cannot be read ({error}); fetch its files again") from None
    if "tokenizer.json" not in there and SENTENCES in there and _prefixes_every_piece(folder):
        tokenizer = _with_prefixes(tokenizer)
    tokenizer.name_or_path = ""
    _check_added(tokenizer, folder)
    return tokenizer


def m3d_token_ids(tokenizer: PreTrainedTokenizerBase, where: Path) -> TokenIds:
    """The ids of our four tokens.

    Raises:
        ValueError: The tokenizer does not know one.
    """
    vocabulary = tokenizer.get_vocab()
    missing = [token for token in (IMAGE_TOKEN, BOX_START, BOX_END, SEG_TOKEN) if token not in vocabulary]
    if missing:
        raise ValueError(
            f"{where}: its tokenizer does not know {', '.join(missing)}; take that of the released M3D-LaMed folder "
            "(added_tokens.json and tokenizer_config.json with it): --beside FOLDER"
        )
    return TokenIds(
        image_token_id=vocabulary[IMAGE_TOKEN],
        box_start_token_id=vocabulary[BOX_START],
        box_end_token_id=vocabulary[BOX_END],
        seg_token_id=vocabulary[SEG_TOKEN],
    )


def _prefixes_every_piece(folder: Path) -> bool:
    """Whether text after an added token begins with a space of its own, as in transformers 4 unless ``legacy: false``.

    transformers 5 reads a folder that does not say it as if it said false.
    """
    path = folder / "tokenizer_config.json"
    fields = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return fields.get("legacy") is not False


def _with_prefixes(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """The same words with sentencepiece's space before every stretch of text, under a class that keeps it so."""
    words: Any = tokenizer
    described = json.loads(words.backend_tokenizer.to_str())
    prefix = {"type": "Prepend", "prepend": SPACE}
    spaces = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    described |= {"normalizer": {"type": "Sequence", "normalizers": [prefix, spaces]}, "pre_tokenizer": None}
    for token in described["added_tokens"]:
        token["normalized"] = False  # else it would be looked for with the space before it
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items() if isinstance(token, str)}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(described)),
        model_max_length=tokenizer.model_max_length,
        padding_side=tokenizer.padding_side,
        **special,
    )


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # of a package that is not there
        return False


def _without_code(path: Path) -> None:
    """Take out what names code of the folder's own."""
    if path.is_file():
        fields = json.loads(path.read_text(encoding="utf-8"))
        fields.pop("auto_map", None)
        path.write_text(json.dumps(fields), encoding="utf-8")


def _check_added(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    path, vocabulary = folder / "added_tokens.json", tokenizer.get_vocab()
    said = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    for token, number in said.items():
        if vocabulary.get(token) != number:
            raise ValueError(
                f"{path}: {token} is {number}, but the tokenizer reads it as {vocabulary.get(token)}; are these files "
                "of one tokenizer?"
            )
