"""The rules of m3d.record/1 that a JSON Schema can say and pydantic's field types cannot.

`data_prep.record` checks them all, and more.

They are written into the published schema only, in the words of JSON Schema: its patterns have look-ahead, pydantic's
have not. Each says a rule of the record or less, never more, so that every valid record is valid for others, too.

Part of m3d-lamed; import through `m3d`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

__all__ = [
    "AXES",
    "MASK",
    "MEDIA",
    "ORIENT",
    "PATH",
    "PROMPT",
    "RUNS",
    "TARGET",
    "WINDOW",
    "known_tasks",
    "needs",
    "placed",
]

Rule = dict[str, Any]
_GIVEN: Rule = {"not": {"type": "null"}}  # null is as good as not given


def _has(*keys: str) -> Rule:
    return {"required": list(keys), "properties": dict.fromkeys(keys, _GIVEN)}


def _either(one: str, other: str) -> Rule:
    """Exactly one of two keys is given."""
    return {"oneOf": [_has(one), _has(other)]}


def _together(**wanted: tuple[str, ...]) -> Rule:
    """A key that is given needs others."""
    return {"allOf": [{"if": _has(key), "then": _has(*others)} for key, others in wanted.items()]}


PATH: Final[Rule] = {
    "pattern": r"^(?![/~])(?!(?:\.?/)*[^/]*:)(?!(?:.*/)?\.\.(?:/|$))[^\\]*[^\s\\][^\\]*$",
    "description": "Relative to the data root and inside it, with / between its parts.",
}
ORIENT: Final[Rule] = {
    "pattern": r"^(?!.*[RL].*[RL])(?!.*[AP].*[AP])(?!.*[SI].*[SI])[RLAPSI]{2,3}$",
    "description": "Where each spatial axis grows to in the patient, in array order, such as SPL.",
}
AXES: Final[Rule] = {
    "pattern": r"^(?!.*(.).*\1)[CTDHW]+$",
    "description": "What each side of shape is: D, H, W in space, T in time, C a channel.",
}
RUNS: Final[Rule] = {"pattern": r"^\s*(\d+\s+\d+(\s+|$))*$"}
MEDIA: Final[Rule] = {"if": _has("frames"), "then": {"properties": {"kind": {"const": "video"}}}}
PROMPT: Final[Rule] = {
    **_either("template", "text"),
    "if": _has("text"),
    "then": {"properties": {"slots": {"maxProperties": 0}}},
}
WINDOW: Final[Rule] = _together(lo=("hi",), hi=("lo",))
MASK: Final[Rule] = {**_either("path", "rle"), **_together(path=("label",), label=("path",))}
TARGET: Final[Rule] = {
    "minProperties": 1,
    **_together(options=("choice",), choice=("options",), value=("quantity", "unit")),
}


def needs(tasks: Mapping[str, tuple[str, ...]]) -> Rule:
    """The target keys without which a known task has no truth."""
    rules = [
        {
            "if": {"required": ["task"], "properties": {"task": {"const": task}}},
            "then": {"properties": {"target": _has(*keys)}},
        }
        for task, keys in tasks.items()
        if keys
    ]
    return {"allOf": rules}


def known_tasks(tasks: Mapping[str, tuple[str, ...]]) -> Rule:
    """Names them; others stay allowed."""
    return {"description": f"Known: {', '.join(tasks)}. Others are allowed; what their target needs is not checked."}


def placed(*keys: str) -> Rule:
    """Corners lie in the image as far as that can be said without it: not below 0, and up to 1 in the norm frame."""

    def limited(**limits: int) -> Rule:
        return {"properties": {key: {"items": limits} for key in keys}}

    norm = {"if": {"required": ["frame"], "properties": {"frame": {"const": "norm"}}}, "then": limited(maximum=1)}
    inside = {"if": {"properties": {"frame": {"enum": ["voxel", "norm"]}}}, "then": limited(minimum=0)}
    return {"allOf": [inside, norm]}
