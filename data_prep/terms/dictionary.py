"""What a structure is called, under all its names, and how it is described without saying any of them.

Referring tasks ask for "the pear-shaped sac on the underside of the liver" in place of "the gallbladder". The wording
is data (``data_prep/terms/<lang>/*.yaml``), ours by default; `published_terms` puts the phrases that M3D published in
its place.

Part of m3d-lamed; import through `m3d`.
"""

from __future__ import annotations

import ast
import difflib
import functools
import json
import logging
import random
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, get_args

import yaml
from pydantic import ConfigDict, Field, StringConstraints, TypeAdapter, ValidationError

__all__ = [
    "KINDS",
    "Term",
    "Terms",
    "describe",
    "find",
    "load_terms",
    "published_terms",
    "read_published",
    "read_terms",
]

logger = logging.getLogger(__name__)

Kind = Literal["organ", "bone", "cartilage", "vessel", "muscle", "nerve", "region", "lesion", "object", "other"]
Side = Literal["left", "right"]
Words = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1)]
KINDS: tuple[str, ...] = get_args(Kind)
SIDES: tuple[str, ...] = get_args(Side)


@dataclass(frozen=True, kw_only=True)
class Term:
    """One structure; the first description is the one used in evaluation, ``side`` is the patient's."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    name: Words
    kind: Kind
    side: Side | None = None
    aliases: tuple[Words, ...] = ()
    descriptions: Annotated[tuple[Words, ...], Field(min_length=1)]

    def describe(self, rng: random.Random | None = None) -> str:
        """The first description, or with ``rng`` any of them."""
        return self.descriptions[0] if rng is None else rng.choice(self.descriptions)


class Terms(Mapping[str, Term]):
    """Terms by name, in order; `find` also takes aliases, underscores, any case, and the side before or behind.

    Raises:
        ValueError: Two terms claim the same name.
    """

    def __init__(self, terms: Iterable[Term]) -> None:
        self._terms: dict[str, Term] = {}
        self._index: dict[str, Term] = {}
        for term in terms:
            for name in (term.name, *term.aliases):
                owner = self._index.setdefault(_key(name), term)
                if owner is not term:
                    raise ValueError(f"{name!r} names two terms, {owner.name!r} and {term.name!r}; drop it from one")
            self._terms[term.name] = term

    def __getitem__(self, name: str) -> Term:
        return self._terms[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._terms)

    def __len__(self) -> int:
        return len(self._terms)

    def find(self, name: str) -> Term:
        """The term that ``name`` stands for, as people and data sets write it: ``adrenal_gland_right``.

        Raises:
            ValueError: No term has that name; the message suggests the nearest.
        """
        key = _key(name)
        if key not in self._index:
            close = difflib.get_close_matches(key, self._index, n=1)
            hint = f"did you mean {self._index[close[0]].name!r}?" if close else "data_prep.terms.load_terms() has all"
            raise ValueError(f"no term is called {name!r}; {hint}")
        return self._index[key]


def load_terms(lang: str = "en") -> Terms:
    """Our own dictionary, read once per language.

    Raises:
        FileNotFoundError: There are no terms in that language.
    """
    return _load_terms(lang)


def find(name: str, *, terms: Terms | None = None) -> Term:
    """The term that ``name`` or an alias stands for, among ``terms`` (ours in English, if not given).

    Raises:
        ValueError: No term has that name; the message suggests the nearest.
    """
    return (load_terms() if terms is None else terms).find(name)


def describe(name: str, rng: random.Random | None = None, *, terms: Terms | None = None) -> str:
    """A description that does not say ``name``: the first in evaluation, a seeded choice with ``rng`` in training.

    Raises:
        ValueError: No term has that name; the message suggests the nearest.
    """
    return find(name, terms=terms).describe(rng)


def read_terms(path: Path | Traversable) -> tuple[Term, ...]:
    """Terms of one YAML file: ``version: 1`` and a list ``terms`` of name, kind, side, aliases, descriptions.

    Raises:
        ValueError: The file is not of that form; the message names it, the term and the key.
    """
    try:
        loaded = yaml.load(path.read_text(encoding="utf-8"), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not YAML ({' '.join(str(error).split())})") from error
    if not isinstance(loaded, dict) or loaded.get("version") != 1 or set(loaded) != {"version", "terms"}:
        raise ValueError(f"{path}: expected the keys 'version: 1' and 'terms', and no others")
    try:
        return _TERM_LIST.validate_python(loaded["terms"])
    except ValidationError as error:
        raise ValueError(f"{path}: {_explain(error, loaded['terms'])}") from error


def read_published(path: Path | str) -> dict[str, tuple[str, ...]]:
    """The dictionary as M3D published it, name to phrases: a ``.json``, or the ``.py`` that assigns one dict literal.

    The Python form is parsed and never run. Phrases that a term repeats are kept once; how many is logged.

    Raises:
        ValueError: The file is not of that form; the message names it and the key.
    """
    path = Path(path)
    readers = {".json": _pairs_of_json, ".py": _pairs_of_python}
    if path.suffix not in readers:
        raise ValueError(f"{path}: a published term dictionary ends in .json or .py")
    try:
        pairs = readers[path.suffix](path.read_text(encoding="utf-8"))
    except (SyntaxError, ValueError, RecursionError) as error:  # JSON's and UTF-8's errors are ValueErrors
        raise ValueError(f"{path}: not a published term dictionary ({error})") from error
    phrases: dict[str, tuple[str, ...]] = {}
    num_repeated = 0
    for name, listed in pairs:
        if not isinstance(name, str) or not name.strip():
            raise ValueError(f"{path}: the name {name!r} is not text; every key names a structure")
        if name in phrases:
            logger.warning("%s: %r is given twice; the last one counts", path, name)
        stripped = _phrases(listed, f"{path}: {name!r}")
        phrases[name] = _distinct(stripped)
        num_repeated += len(stripped) - len(phrases[name])
    logger.info("%s: %d terms, %d repeated descriptions dropped", path, len(phrases), num_repeated)
    return phrases


def published_terms(path: Path | str) -> Terms:
    """The published phrases as terms, in place of ours: found under our names and aliases as well as its own.

    Published names of one structure ("gallbladder", "gall bladder") become one term with the phrases of both. What ours
    does not know is of kind ``other``, its side taken from its words.
    """
    gathered: dict[str, tuple[Term, list[str]]] = {}
    for name, phrases in read_published(path).items():
        try:
            known = find(name)
        except ValueError:
            known = Term(name=name, kind="other", side=_side(name), descriptions=phrases)
        gathered.setdefault(_key(known.name), (known, []))[1].extend(phrases)
    return Terms(
        Term(name=term.name, kind=term.kind, side=term.side, aliases=term.aliases, descriptions=_distinct(phrases))
        for term, phrases in gathered.values()
    )


@functools.cache
def _load_terms(lang: str) -> Terms:
    folder = resources.files("data_prep.terms") / lang
    files = [file for file in folder.iterdir() if file.name.endswith(".yaml")] if folder.is_dir() else []
    if not files:
        raise FileNotFoundError(f"no terms for lang={lang!r}; add data_prep/terms/{lang}/*.yaml")
    return Terms(term for file in sorted(files, key=lambda file: file.name) for term in read_terms(file))


def _key(name: str) -> str:
    """A name without case and punctuation, its side in front: ``Kidney_Left`` -> ``left kidney``."""
    words = re.sub(r"[\W_]+", " ", name.casefold()).split()
    return " ".join(sorted(words, key=lambda word: word not in SIDES))


def _side(name: str) -> Side | None:
    found = {word for word in _key(name).split() if word in SIDES}
    if len(found) != 1:
        return None
    return "left" if "left" in found else "right"


def _distinct(phrases: Iterable[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(phrases))


def _explain(error: ValidationError, listed: Any) -> str:  # noqa: ANN401
    """The first fault in one line: which term, which key, what is wrong."""
    fault = error.errors()[0]
    if not fault["loc"]:
        return f"terms: {fault['msg']}"
    number, *keys = fault["loc"]
    raw = listed[number]
    name = raw.get("name") if isinstance(raw, dict) else None
    return f"term {name!r} (number {int(number) + 1}): {'.'.join(map(str, keys)) or 'term'}: {fault['msg']}"


def _pairs_of_json(text: str) -> list[tuple[Any, Any]]:
    loaded = json.loads(text, object_pairs_hook=_Pairs)
    if not isinstance(loaded, _Pairs):
        raise ValueError("expected one object of name: [descriptions]")
    return list(loaded)


def _pairs_of_python(text: str) -> list[tuple[Any, Any]]:
    assigned = [node.value for node in ast.parse(text).body if isinstance(node, ast.Assign | ast.AnnAssign)]
    literals = [value for value in assigned if isinstance(value, ast.Dict)]
    if len(literals) != 1:
        raise ValueError(f"expected one assigned dict literal, found {len(literals)}")
    pairs = zip(literals[0].keys, literals[0].values, strict=True)
    return [(None if key is None else _literal(key), _literal(value)) for key, value in pairs]


def _literal(node: ast.expr) -> Any:  # noqa: ANN401
    try:
        return ast.literal_eval(node)
    except ValueError as error:
        raise ValueError(f"line {node.lineno}: {ast.unparse(node)[:40]!r} is not a literal") from error


def _phrases(listed: Any, where: str) -> list[str]:  # noqa: ANN401
    if not isinstance(listed, list | tuple) or not listed:
        raise ValueError(f"{where}: expected a list with at least one description")
    for number, phrase in enumerate(listed, start=1):
        if not isinstance(phrase, str) or not phrase.strip():
            raise ValueError(f"{where}: description {number} is {phrase!r}, expected text")
    return [phrase.strip() for phrase in listed]


class _Pairs(list[tuple[str, Any]]):
    """An object of JSON as its pairs, so that a name given twice is noticed."""


_TERM_LIST = TypeAdapter(tuple[Term, ...])
