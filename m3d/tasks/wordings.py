"""The wordings of every task, a YAML file a language: checked when read, drawn from, and read backwards.

A language is added as one file beside ``en.yaml`` that has the lists of `SLOTS`, each variant with just the slots that
its list declares; nothing in the code knows English but the fallback of `m3d.tasks.naming`.
"""

import functools
import random
import re
import string
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from types import MappingProxyType
from typing import Any

import yaml

VERSION = 2
SLOTS: Mapping[str, Mapping[str, frozenset[str]]] = MappingProxyType(
    {  # wording -> part -> the slots that every variant of the list has
        "report": {"prompt": frozenset()},
        "vqa.closed": {"prompt": frozenset({"question", "choices"})},
        "vqa.closed.yes_no": {"prompt": frozenset({"question"})},
        "rec.box3d": {
            "prompt": frozenset({"name"}),
            "answer": frozenset({"name", "box"}),
            "absent": frozenset({"name"}),
        },
        "rec.box3d.description": {
            "prompt": frozenset({"description"}),
            "answer": frozenset({"name", "box"}),
            "absent": frozenset(),
        },
        "reg": {"prompt": frozenset({"box"}), "answer": frozenset({"name"}), "absent": frozenset({"name"})},
        "reg.description": {
            "prompt": frozenset({"box"}),
            "answer": frozenset({"name", "description"}),
            "absent": frozenset(),
        },
        "seg.sem": {"prompt": frozenset({"names"}), "answer": frozenset({"masks"}), "absent": frozenset({"name"})},
        "seg.ref": {"prompt": frozenset({"description"}), "answer": frozenset({"masks"}), "absent": frozenset()},
    }
)
OPTIONAL = {("report", "prompt"): frozenset({"modality"})}
JOINERS = ("named", "comma", "and")  # the keys of ``list``: how several names become one phrase


@functools.cache
def languages() -> tuple[str, ...]:
    """The languages that there are wordings of."""
    folder = resources.files("m3d.tasks") / "templates"
    return tuple(sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml")))


@functools.cache
def templates(lang: str) -> dict[str, Any]:
    """The checked wordings of a language; of ``zh-CN`` those of ``zh`` where it has none of its own.

    Raises:
        FileNotFoundError: There are no templates in that language.
        ValueError: The file breaks a rule; see `check_templates`.
    """
    known = languages()
    found = next((name for name in (lang, lang.partition("-")[0]) if name in known), None)
    if found is None:
        raise FileNotFoundError(
            f"no templates for lang={lang!r}, only for {', '.join(known)}; "
            f"add m3d/tasks/templates/{lang}.yaml with the lists and slots of en.yaml"
        )
    text = (resources.files("m3d.tasks") / "templates" / f"{found}.yaml").read_text(encoding="utf-8")
    loaded: dict[str, Any] = yaml.safe_load(text)
    check_templates(loaded, f"m3d/tasks/templates/{found}.yaml")
    return loaded


def check_templates(loaded: Any, where: str) -> None:  # noqa: ANN401
    """Refuse a file of wordings that is not as `SLOTS` says.

    Raises:
        ValueError: A list is missing, unknown or empty, a variant has other slots than its list, or is there twice.
    """
    if not isinstance(loaded, dict) or loaded.get("version") != VERSION:
        raise ValueError(f"{where}: not a file of wordings of version: {VERSION}; compare it with en.yaml")
    _check_keys(loaded, {"version", "list", *SLOTS}, where)
    _check_keys(loaded["list"], set(JOINERS), f"{where}: list")
    for wording, parts in SLOTS.items():
        _check_keys(loaded[wording], set(parts), f"{where}: {wording}")
        for part, needed in parts.items():
            _check_variants(loaded[wording][part], needed, OPTIONAL.get((wording, part), frozenset()), where, wording)


def _check_keys(given: Any, wanted: set[str], where: str) -> None:  # noqa: ANN401
    found = set(given) if isinstance(given, dict) else set()
    if found != wanted:
        wrong = sorted(map(str, found ^ wanted))
        raise ValueError(f"{where}: missing or unknown: {', '.join(wrong)}; compare it with en.yaml")


def _check_variants(
    variants: Any,  # noqa: ANN401
    needed: frozenset[str],
    optional: frozenset[str],
    where: str,
    wording: str,
) -> None:
    if not isinstance(variants, list) or not variants or not all(isinstance(one, str) and one for one in variants):
        raise ValueError(f"{where}: {wording}: a list of one or more sentences is needed, got {variants!r:.60}")
    for number, variant in enumerate(variants):
        slots = [name for _, name, *_ in string.Formatter().parse(variant) if name is not None]
        if len(set(slots)) != len(slots) or not needed <= set(slots) <= needed | optional:
            wanted = ", ".join(f"{{{name}}}" for name in sorted(needed)) or "no slot"
            raise ValueError(f"{where}: {wording}: {variant!r} must have {wanted}, each once")
        if variant in variants[:number]:
            raise ValueError(f"{where}: {wording}: {variant!r} is there twice; every variant counts once")


@functools.cache
def slots_of(variant: str) -> frozenset[str]:
    """The names of a variant's slots."""
    return frozenset(name for _, name, *_ in string.Formatter().parse(variant) if name is not None)


@dataclass(frozen=True)
class Phrases:
    """The wordings of one language: the first of each in evaluation, a seeded choice in training."""

    lang: str = "en"
    rng: random.Random | None = None

    def __call__(self, task: str, part: str, **slots: object) -> str:
        """One wording of ``part`` (``prompt``, ``answer``, ``absent``) of a task, its slots filled.

        Variants with an optional slot (``modality``) are drawn only where it is given.
        """
        given = slots.keys()
        variants = [variant for variant in templates(self.lang)[task][part] if slots_of(variant) <= given]
        return str(variants[0] if self.rng is None else self.rng.choice(variants)).format(**slots)

    def named(self, name: str) -> str:
        """A name as it stands in a request for several: ``the liver``."""
        return str(templates(self.lang)["list"]["named"]).format(name=name)

    def join(self, parts: list[str]) -> str:
        """``a``, ``a and b``, ``a, b and c``."""
        words = templates(self.lang)["list"]
        return join_with(parts, comma=words["comma"], last=words["and"])


def join_with(parts: list[str], *, comma: str, last: str) -> str:
    """Several parts as one phrase; ``comma`` stands between them, ``last`` before the last."""
    return last.join([comma.join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)


def read_back(wordings: tuple[str, ...], part: str, text: str) -> dict[str, str] | None:
    """The slots of an answer that is one of our wordings in any language, None where it is none of them."""
    said = text.strip().rstrip(".。 ")
    for pattern in _patterns(wordings, part):
        found = pattern.fullmatch(said)
        if found:
            return {name: value.strip() for name, value in found.groupdict().items()}
    return None


@functools.cache
def _patterns(wordings: tuple[str, ...], part: str) -> tuple[re.Pattern[str], ...]:
    """A pattern a variant, those with the most words of their own first."""
    lists = [templates(lang)[wording][part] for lang in languages() for wording in wordings]
    variants = [variant.rstrip(".。 ") for variants in lists for variant in variants]
    variants.sort(key=lambda variant: -len(re.sub(r"\{\w+\}", "", variant)))
    return tuple(re.compile(inverse(variant), re.IGNORECASE | re.DOTALL) for variant in variants)


def inverse(variant: str) -> str:
    """The pattern of what a variant becomes, a named group for each slot."""
    parts = string.Formatter().parse(variant)
    return "".join(re.escape(words) + (f"(?P<{slot}>.+?)" if slot else "") for words, slot, *_ in parts)
