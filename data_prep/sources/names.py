"""File and class names as people say them: the names of a case are words that stand in prompts and answers.

Part of m3d-lamed; import through `m3d`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

__all__ = ["natural_name", "natural_names"]

_SIDES = {"left": "left", "right": "right", "l": "left", "r": "right", "lt": "left", "rt": "right"}
_LEVELS = re.compile(r"(?:[CTLS]\d{1,2}|Co\d?)", re.IGNORECASE)
_WORDS = {  # classes of TotalSegmentator and others that are half Latin, or plural where one of them is meant
    "clavicula": "clavicle",
    "vertebrae": "vertebra",
    "autochthon": "deep back muscles",
    "vena": "vein",
    "oesophagus": "esophagus",
}
_WHOLE = {  # names that no rule finds
    "inferior_vena_cava": "inferior vena cava",
    "superior_vena_cava": "superior vena cava",
    "vertebrae": "vertebrae",
    "heart_atrium_left": "left atrium",
    "heart_atrium_right": "right atrium",
    "heart_ventricle_left": "left ventricle",
    "heart_ventricle_right": "right ventricle",
    "atrial_appendage_left": "left atrial appendage",
    "hip_left": "left hip bone",
    "hip_right": "right hip bone",
}


def natural_name(raw: str) -> str:
    """A class or file name in natural wording, the side in front: ``kidney_left`` -> ``left kidney``.

    A name that is already natural stays as it is. Levels keep their capitals (``vertebrae_L3`` -> ``vertebra L3``), and
    so do words with digits and short capitals (``PTV56``, ``IVC``).

    Raises:
        ValueError: There is no letter and no digit in it.
    """
    spaced = re.sub(r"(?<=[a-z])(?=[A-Z][a-z])", " ", raw.strip())
    between = r"[\s_.]+" if re.search(r"[\s_]", raw.strip()) else r"[\s_.\-]+"  # the hyphen of "non-enhancing tumor"
    tokens = [token for token in re.split(between, spaced) if token]
    if not any(character.isalnum() for character in raw):
        raise ValueError(f"{raw!r} is no name of a structure; give it a word")
    whole = _WHOLE.get("_".join(tokens).lower())
    if whole is not None:
        return whole
    side = _side(tokens)
    if side is not None:
        word = _SIDES[tokens.pop(side).lower()]
        tokens.insert(0, word)
    has_level = any(_LEVELS.fullmatch(token) for token in tokens)
    return " ".join(_spoken(token, has_level) for token in tokens)


def natural_names(raw: Mapping[int, str], renamed: Mapping[str, str]) -> dict[int, str]:
    """The names of label values, without the background; ``renamed`` has names that are wanted as they stand."""
    return {value: renamed.get(name) or natural_name(name) for value, name in raw.items() if value != 0}


def _side(tokens: list[str]) -> int | None:
    """Where the one word of side stands; a single letter counts at either end only, and never alone."""
    if len(tokens) < 2:
        return None
    places = [
        number
        for number, token in enumerate(tokens)
        if token.lower() in ("left", "right") or (token.lower() in _SIDES and number in (0, len(tokens) - 1))
    ]
    return places[0] if len(places) == 1 else None


def _spoken(token: str, has_level: bool) -> str:
    if _LEVELS.fullmatch(token):
        return token.upper() if token[0].lower() != "c" or token[1:].isdigit() else token.capitalize()
    capitals = sum(character.isupper() for character in token)
    short = capitals == len(token) <= 3 or 1 < capitals < len(token)  # IVC, GTVp; not LIVER
    if short or any(character.isdigit() for character in token):
        return token
    word = token.lower()
    if word == "vertebrae" and not has_level:
        return word
    return _WORDS.get(word, word)
