"""What a text binds: left and right, up and down, front and back, density.

A picture may be flipped or turned only where nothing that is said about it becomes false, and "left" hides in names of
structures, in abbreviations and, in other words, means nothing of the kind ("left untreated"). In doubt a text counts
as bound: that costs one flip, a missed word costs a lie. English and Chinese are known.

A mirrored patient is no patient (heart, liver and spleen change sides: situs inversus), so mirroring left and right is
never a default. It can be right only for regions that are close to symmetric (head and neck, pelvis, limbs), and then
either where no text speaks of sides, or with texts (`mirrored`) and labels (`swap_sides`) swapped along.

Part of m3d-lamed; import through `m3d`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Literal

__all__ = [
    "PatientAxis",
    "axis_of",
    "bound_axes",
    "mirrorable",
    "mirrored",
    "speaks_of_density",
    "speaks_of_sides",
    "strings_in",
    "swap_sides",
]

PatientAxis = Literal["R", "A", "S"]
_AXIS_OF: Mapping[str, PatientAxis] = {"R": "R", "L": "R", "A": "A", "P": "A", "S": "S", "I": "S"}

# Organs beside which a single letter means a side: "L kidney", "lung R"; not "L spine", "5 L of fluid".
_ORGAN = (
    r"(?:kidney|renal|adrenal|lung|lobe|pleura|pleural|hemithorax|breast|atrium|ventricle|carotid|jugular|iliac|parotid"
    r"|submandibular|thyroid|eye|lens|optic|orbit|cochlea|ear|maxill\w+|mandible|temporal|frontal|parietal|occipital"
    r"|hemisphere|hip|femur|femoral|tibia|fibula|knee|ankle|foot|shoulder|humerus|clavicle|scapula|rib|hand|wrist"
    r"|ovary|testis|ureter|side)s?"
)
_AFTER_RT = r"(?:dose|plan|planning|struct\w*|fields?|treatment|the|was|is|are|and|or|to|for|with|in|on|at|by|of)\b"

_SIDES = re.compile(
    rf"""
    (?P<other>                                    # left and right that are no sides: read first, left as they are
        (?i:,\s*right\s*(?=\?))
      | (?i:\b(?:is|was)\s+(?:it|that|this)\s+right\b(?=\s*(?:\?|that\b|to\s+(?:say|assume|conclude))))
      | (?i:\b(?:it\s+is|it's|that's|that\s+is)\s+right\b(?=\s*(?:,|that\b|to\s+(?:say|assume|conclude))))
      | (?i:\ball\s+right\b(?=\s*(?:[?.!,]|$)))
      | (?i:\bright\s+(?:now|away|after|before|here|there|answer|option|choice|diagnosis|or\s+wrong)\b)
      | (?i:\bwrong\s+or\s+right\b)
      | (?i:\bright[\s-]+angle(?:s|d)?\b)
      | (?i:\bleft\s*-?\s*overs?\b)
      | (?i:\bleft\s+(?:untreated|unchanged|undisturbed|unattended|unrepaired|unresected|unexplained|unanswered)\b)
      | (?i:\bleft\s+(?:in\s+(?:place|situ)|alone|behind|as\s+(?:is|it))\b)
      | (?i:\b(?:what|nothing|anything|something|much|little|none|how\s+much(?:\s+\w+){{1,3}})(?:'s|\s+is|\s+was)?
            \s+left(?=\s*(?:[?.!,;]|after\b|$)))
      | 左右                                       # both, or "about"
    )
  | (?P<word>(?:(?<![A-Za-z])(?:left|right)|(?<![A-Z])(?:Left|Right)|(?<![A-Za-z])(?:LEFT|RIGHT)(?![A-Z]))
        (?:wards?|most|sided|handed)?(?![a-z]))
  | (?P<short>(?<![A-Za-z&])[LlRr]t(?![A-Za-z0-9])
        | (?<![A-Za-z])[LR]T(?=[\s_-]+(?!(?i:{_AFTER_RT}))[A-Za-z]) | (?<=_)[LR]T(?![A-Za-z0-9]))
  | (?P<letter>(?<=_)[LRlr](?![A-Za-z0-9]) | (?<=[A-Za-z]{{2}}-)[LRlr](?![A-Za-z0-9])   # Kidney_L, kidney-l
        | (?<![A-Za-z0-9])[LR](?=_[A-Za-z]) | (?<=\()[LR](?=\))
        | (?<![A-Za-z0-9])(?<!\d\s)[LR](?=(?:\.?\s+|-)(?i:{_ORGAN})\b))
  | (?i:\b{_ORGAN})\s+(?P<tail>[LR])(?![A-Za-z0-9])
  | (?<![A-Za-z0-9])(?P<pair>[LR]\s*[/<>]\s*[LR])(?![A-Za-z0-9])
  | (?P<region>(?<![A-Za-z])(?:[LR][UL]L|[LR][UL]Q|[LR]IF|[LR]V(?:H|EF|OT)?|[LR]IJ|[LR]AO)(?![A-Za-z]))
  | (?P<turned>(?i:(?<![a-z])(?:dextro|levo)(?=scolio|convex|curv|rotat|posit|card|version)))
  | (?P<fixed>(?<![A-Za-z])(?:RML|LAD|LC[Xx]|LMCA|RCA)(?![A-Za-z]) | (?i:\bsitus\s+(?:in\w+|solitus|ambig\w+))
        | (?i:\bo'clock\b) | (?i:\b(?:counter-?|anti-?)?clockwise\b))
  | (?P<chinese>[左右])
    """,
    re.VERBOSE,
)

_LATERAL = re.compile(r"(?<![a-z])(?:(?:lateral|medial)(?:ly)?|(?:para|mid)?sagittal)(?![a-z])|矢状|内侧|外侧", re.I)
_FRONT = re.compile(
    r"(?<![a-z])(?:anterior|posterior|antero|postero|ventral|ventro|dorsal|dorso|front|behind|forward|prone|supine"
    r"|retro[a-z]|coronal|backward)|(?<![a-z-])back(?![a-z])|(?-i:(?<![A-Za-z])(?:AP|PA)(?![A-Za-z]))"
    r"|冠状|仰卧|俯卧|腹侧|背侧|(?<![目以之术提])前(?!列腺)|(?<![术随然最今之以])[后後](?!续)",
    re.I,
)
_HEIGHT = re.compile(
    r"(?<![a-z])(?:superior|inferior|supero|infero|upper|lower|cranial|cranio|caudal|caudad|cephalad|cephalic|rostral"
    r"|above|below|beneath|under|top|bottom|upward|downward|down(?![a-z])|higher|highest|lowest|apex|apical|basal"
    r"|supra[a-z]|infra[a-z]|axial|transaxial|transvers|horizontal|vertical)|(?<![a-z-])up(?![a-z])"
    r"|(?-i:(?<![A-Za-z])[LR][UL][LQ](?![A-Za-z]))"
    r"|轴位|轴向|横断|横轴|头侧|尾侧|足侧|(?<![以床本])上(?!述)|(?<![以如况皮])下(?!列)",
    re.I,
)
_CLOCK = re.compile(r"o'clock|clockwise", re.I)
_DENSITY = re.compile(r"(?<![a-z])(?:hu|hounsfield)(?![a-z])|亨氏|亨斯菲尔德|CT值", re.I)


def speaks_of_sides(text: str) -> bool:
    """Whether a text would become false, or mean something else, in a mirrored picture."""
    return next(_sides(text), None) is not None


def speaks_of_density(text: str) -> bool:
    """Whether a text gives Hounsfield units, which a change of contrast makes false."""
    return _DENSITY.search(text) is not None


def bound_axes(texts: Iterable[str]) -> frozenset[PatientAxis]:
    """The patient axes that texts bind: R (right-left), A (front-back), S (up-down).

    A plane binds the axis that it is perpendicular to: an axial slice stays one until S is moved elsewhere.
    """
    bound: set[PatientAxis] = set()
    for text in texts:
        words = re.sub(r"(?<=[a-z])(?=[A-Z])|_", " ", text)  # LungUpperLobe, lung_upper_lobe
        clock = _CLOCK.search(words) is not None
        if clock or speaks_of_sides(text) or _LATERAL.search(words):
            bound.add("R")
        if clock or _FRONT.search(words):
            bound.add("A")
        if _HEIGHT.search(words):
            bound.add("S")
    return frozenset(bound)


def mirrorable(text: str) -> bool:
    """Whether `mirrored` can say it: false for what has one side only, such as the lung's RML."""
    return all(match.lastgroup != "fixed" for match in _sides(text))


def mirrored(text: str) -> str:
    """The text that is true of the mirrored picture: sides swapped, case kept, all else as it was.

    Raises:
        ValueError: The text names something that has no counterpart on the other side ("RML").
    """
    swapped, end = [], 0
    for match in _sides(text):
        group = match.lastgroup
        assert group is not None
        if group == "fixed":
            raise ValueError(f"{match[group]!r} in {text!r} has no mirror image; do not mirror this picture")
        swapped += [text[end : match.start(group)], _swapped(match[group], group)]
        end = match.end(group)
    return "".join([*swapped, text[end:]])


def swap_sides(names: Mapping[int, str]) -> dict[int, int]:
    """Label value -> value of the mirrored structure, itself where a name has no side.

    Raises:
        ValueError: A structure's counterpart has no label, so a mirrored mask could not be named.
    """
    values = {name.casefold(): value for value, name in names.items()}
    swapped = {}
    for value, name in names.items():
        partner = mirrored(name)
        if partner.casefold() not in values:
            raise ValueError(f"{name!r} has no counterpart {partner!r} among the labels; do not mirror this picture")
        swapped[value] = values[partner.casefold()]
    return swapped


def axis_of(orient: str) -> tuple[PatientAxis, PatientAxis, PatientAxis]:
    """The patient axis along each array axis, from axis codes such as "SPL".

    Raises:
        ValueError: The codes are not one each of R/L, A/P and S/I.
    """
    axes = tuple(_AXIS_OF[code] for code in orient if code in _AXIS_OF)
    if len(orient) != 3 or len(axes) != 3 or len(set(axes)) != 3:
        raise ValueError(f"orient={orient!r} is not one each of R/L, A/P and S/I, such as 'SPL'")
    return axes


def strings_in(value: object) -> Iterator[str]:
    """Every string inside nested mappings and sequences, such as a record's slots and target (keys are no text)."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from strings_in(part)
    elif isinstance(value, list | tuple | set | frozenset):
        for part in value:
            yield from strings_in(part)


def _sides(text: str) -> Iterator[re.Match[str]]:
    return (match for match in _SIDES.finditer(text) if match.lastgroup != "other")


def _swapped(token: str, group: str) -> str:
    if group == "word":
        head, other = ("left", "right") if token[0] in "Ll" else ("right", "left")
        return _in_case_of(other, token[: len(head)]) + token[len(head) :]
    if group == "turned":
        return _in_case_of("levo" if token[0] in "Dd" else "dextro", token)
    if group == "pair":
        return token.translate(str.maketrans("LR", "RL"))
    return token[0].translate(str.maketrans("LRlr左右", "RLrl右左")) + token[1:]


def _in_case_of(word: str, like: str) -> str:
    if like.isupper():
        return word.upper()
    return word.title() if like[0].isupper() else word
