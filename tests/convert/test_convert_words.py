"""Released tokenizers keep their tokens and ids; sentencepiece models against the library that made them."""

import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from m3d.convert.words import m3d_token_ids, read_tokenizer

TEXTS = ["Can you segment the liver?", "The left kidney is 10.5 cm long.", "Sure, it is here.", "Is there a fracture?"]
ADDED = ["<im_patch>", "<bx_start>", "<bx_end>", "[SEG]"]
WORDS = 340


def token(content: str) -> dict:
    flags = {"lstrip": False, "rstrip": False, "single_word": False, "normalized": content == "[SEG]"}
    return {"content": content, "special": content != "[SEG]", **flags}


@pytest.fixture
def folder(tmp_path) -> Path:
    """A folder as transformers 4 wrote slow tokenizers: a sentencepiece model, added tokens, no tokenizer.json."""
    pytest.importorskip("sentencepiece", reason="reads and makes sentencepiece models: extra [convert]")
    from sentencepiece import SentencePieceTrainer

    SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS * 20), model_prefix=str(tmp_path / "tokenizer"), vocab_size=WORDS,
        model_type="bpe", byte_fallback=True, unk_id=0, bos_id=1, eos_id=2, pad_id=-1,
        normalization_rule_name="identity", remove_extra_whitespaces=False, minloglevel=2,
    )  # fmt: skip
    known = {"0": "<unk>", "1": "<s>", "2": "</s>"} | {str(WORDS + i): one for i, one in enumerate(ADDED)}
    (tmp_path / "added_tokens.json").write_text(json.dumps({one: WORDS + i for i, one in enumerate(ADDED)}))
    fields = {
        "added_tokens_decoder": {number: token(one) for number, one in known.items()},
        "additional_special_tokens": ADDED[:3],
        **{"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<unk>"},
        **{"add_bos_token": True, "add_eos_token": False, "model_max_length": 512, "padding_side": "right"},
        **{"tokenizer_class": "LlamaTokenizer", "legacy": False, "auto_map": {"AutoTokenizer": ["evil.Words", None]}},
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(fields))
    return tmp_path


def pieces(folder: Path):
    from sentencepiece import SentencePieceProcessor

    return SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))


def say(folder: Path, **changed) -> None:
    path = folder / "tokenizer_config.json"
    fields = json.loads(path.read_text()) | changed
    path.write_text(json.dumps({name: one for name, one in fields.items() if one is not None}))


def test_words_and_ids_are_those_of_sentencepiece(folder):
    tokenizer, library = read_tokenizer(folder), pieces(folder)
    assert list(m3d_token_ids(tokenizer, folder).values()) == [340, 341, 342, 343]
    for text in [*TEXTS, "A naïve Ω, never seen."]:
        assert tokenizer(text)["input_ids"] == [1, *library.encode(text)]


def test_after_an_added_token_no_space_is_made_up(folder):
    tokenizer, library = read_tokenizer(folder), pieces(folder)
    dot = library.piece_to_id(".")
    ids = tokenizer("<im_patch><im_patch> The liver is [SEG].")["input_ids"]
    assert ids == [1, 340, 340, *library.encode("The liver is "), 343, dot]


@pytest.mark.parametrize("said", [True, None], ids=["legacy", "nothing said, which meant legacy"])
def test_older_folders_put_a_space_before_every_stretch_of_text(folder, said):
    say(folder, legacy=said)
    tokenizer, library = read_tokenizer(folder), pieces(folder)
    expected = [1, 340, 340, *library.encode(" The liver is "), 343, *library.encode(".")]
    assert tokenizer("<im_patch><im_patch> The liver is [SEG].")["input_ids"] == expected


@pytest.mark.parametrize("legacy", [False, True])
def test_what_is_saved_reads_the_same_without_sentencepiece(folder, tmp_path, legacy):
    say(folder, legacy=legacy)
    tokenizer = read_tokenizer(folder)
    tokenizer.save_pretrained(tmp_path / "ours")
    assert not (tmp_path / "ours" / "tokenizer.model").exists()
    again = AutoTokenizer.from_pretrained(tmp_path / "ours")
    for text in [*TEXTS, "<im_patch><im_patch> The liver is [SEG]. <bx_start>[1, 2]<bx_end>"]:
        assert again(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert again.pad_token_id == 0
    assert again.decode([343], skip_special_tokens=True) == "[SEG]"  # an ordinary token, as published


def test_ids_that_contradict_the_folder_are_refused(folder):
    (folder / "added_tokens.json").write_text(json.dumps({"[SEG]": 5}))
    with pytest.raises(ValueError, match=r"\[SEG\] is 5, but the tokenizer reads it as 343"):
        read_tokenizer(folder)


def test_without_sentencepiece_the_extra_is_named(tmp_path, monkeypatch):
    (tmp_path / "tokenizer.model").write_bytes(b"\n")
    monkeypatch.setattr("m3d.convert.words._installed", lambda module: False)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'm3d-lamed\[convert\]'"):
        read_tokenizer(tmp_path)


def test_a_folder_without_words_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="has no tokenizer"):
        read_tokenizer(tmp_path)
