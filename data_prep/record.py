"""One training or test entry, ``m3d.record/1``: geometry as numbers, words as templates with slots, every rule checked.

Geometry lies in the stored voxel frame of the image it names (``media``). Prompts and answers are rendered when the
sample is drawn, after augmentation, by the task and its codec. DESIGN 3 explains the fields, and
``docs/record.schema.json`` publishes them with the rules that a JSON Schema can say (`data_prep.schema_rules`); the
others (boxes inside the volume, choices in range) are checked here all the same.

Part of m3d-lamed; import through `m3d`.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath
from typing import Annotated, Any, Final, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from data_prep import schema_rules as rules

__all__ = ["NEEDS", "PLACEHOLDER", "SCHEMA", "Record", "RecordError", "parse"]

SCHEMA: Final = "m3d.record/1"
PLACEHOLDER = "<image>"
NEEDS: Mapping[str, tuple[str, ...]] = {  # the target keys without which a task has no truth
    "retrieval": ("text",),
    "report": ("text",),
    "vqa.closed": ("options", "choice"),
    "vqa.open": ("text",),
    "rec.box3d": ("boxes",),
    "reg": ("boxes",),
    "seg.sem": ("masks",),
    "seg.ref": ("masks",),
    "cls.single": ("options", "choice"),
    "cls.multi": ("labels",),
    "rec.box2d": ("boxes",),
    "landmark": ("points",),
    "polygon": (),  # polygons or masks
    "calc": ("value",),
    "compare": ("text",),
}
_SPATIAL = "DHW"
_PAIRS = ("RL", "AP", "SI")

Identifier = Annotated[str, Field(min_length=1, pattern=r"^\S+$")]
Words = Annotated[str, Field(min_length=1, pattern=r"\S")]
Inside = Annotated[str, Field(min_length=1, pattern=r"\S", json_schema_extra=rules.PATH)]
Frame = Literal["voxel", "norm", "mm"]


class RecordError(ValueError):
    """A record that breaks a rule; the message names the file, the line, the field and the remedy."""


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Origin(_Part):
    """The data set that an entry comes from, and the licence of its content."""

    dataset: Words
    license: str | None = None


class Intensity(_Part):
    """What stored values mean: a ``unit``; for ``norm01`` also which ``lo`` and ``hi``, in ``of``, are 0 and 1."""

    model_config = ConfigDict(json_schema_extra=rules.WINDOW)

    unit: Literal["HU", "norm01", "uint8", "uint16", "arbitrary"]
    of: Literal["HU", "arbitrary"] | None = None
    lo: float | None = None
    hi: float | None = None

    @model_validator(mode="after")
    def _limits(self) -> Self:
        if (self.lo is None) != (self.hi is None):
            raise ValueError("lo and hi are given together or not at all")
        if self.lo is not None and self.hi is not None and not self.lo < self.hi:
            raise ValueError(f"lo={self.lo:g} must lie below hi={self.hi:g}")
        return self


class Frames(_Part):
    """Which frames of a video are shown."""

    sample: Literal["uniform", "first", "all"]
    n: Annotated[int, Field(gt=0)]


class Media(_Part):
    """One image, volume or video: where it is stored, its shape, and where its axes lie in the patient."""

    model_config = ConfigDict(json_schema_extra=rules.MEDIA)

    image_id: Identifier
    kind: Literal["volume", "image", "video"]
    path: Inside
    modality: Words
    shape: Annotated[tuple[Annotated[int, Field(gt=0)], ...], Field(min_length=2)]
    axes: Annotated[str, Field(pattern=r"^[CTDHW]+$", json_schema_extra=rules.AXES)]
    spacing_mm: tuple[Annotated[float, Field(gt=0)], ...] | None = None
    orient: Annotated[str, Field(json_schema_extra=rules.ORIENT)] | None = None
    intensity: Intensity
    frames: Frames | None = None

    @property
    def size(self) -> tuple[int, ...]:
        """The sides along the spatial axes, in array order."""
        return tuple(side for side, axis in zip(self.shape, self.axes, strict=True) if axis in _SPATIAL)

    @model_validator(mode="after")
    def _hang_together(self) -> Self:
        _inside_root(self.path)
        if len(set(self.axes)) != len(self.axes) or len(self.axes) != len(self.shape):
            raise ValueError(f"axes={self.axes!r} must name each of the {len(self.shape)} sides of shape once")
        wanted = {"volume": set("DHW"), "image": set("HW"), "video": set("THW")}[self.kind]
        if set(self.axes) - {"C"} != wanted:
            raise ValueError(f"kind {self.kind!r} has the axes {''.join(sorted(wanted))}, got axes={self.axes!r}")
        if self.spacing_mm is not None and len(self.spacing_mm) != len(self.size):
            raise ValueError(f"spacing_mm needs {len(self.size)} numbers, one a spatial axis, got {self.spacing_mm}")
        if self.orient is not None:
            known = [pair for pair in _PAIRS for code in self.orient if code in pair]
            if len(self.orient) != len(self.size) or len(set(known)) != len(self.orient):
                raise ValueError(
                    f"orient={self.orient!r} must say for each spatial axis where it grows to, like 'SPL' or 'IL'"
                )
        if self.frames is not None and self.kind != "video":
            raise ValueError(f"frames are for videos, this is a {self.kind}")
        return self


class Prompt(_Part):
    """What is asked: a template with its slots, or a text as it stands."""

    model_config = ConfigDict(json_schema_extra=rules.PROMPT)

    template: Words | None = None
    slots: dict[str, Any] = Field(default_factory=dict)
    text: Words | None = None

    @model_validator(mode="after")
    def _one_of_two(self) -> Self:
        if (self.template is None) == (self.text is None):
            raise ValueError("a prompt is a template (with slots) or a text: give exactly one")
        if self.text is not None and self.slots:
            raise ValueError("slots belong to a template; a text takes none")
        return self


class _Placed(_Part):
    name: str
    media: Annotated[int, Field(ge=0)] = 0


class BoxTruth(_Placed):
    """A half-open box in array-axis order; see `data_prep.boxes`."""

    model_config = ConfigDict(json_schema_extra=rules.placed("lo", "hi"))

    lo: tuple[float, ...]
    hi: tuple[float, ...]
    frame: Frame = "voxel"


class PointTruth(_Placed):
    """A point as (fractional) voxel index, in array-axis order."""

    model_config = ConfigDict(json_schema_extra=rules.placed("at"))

    at: tuple[float, ...]
    frame: Frame = "voxel"


class PolygonTruth(_Placed):
    """A closed outline in an image, its corners in array-axis order."""

    points: Annotated[tuple[tuple[float, float], ...], Field(min_length=3)]
    frame: Frame = "voxel"


class Runs(_Part):
    """A mask as run lengths: ascending ``start length`` pairs over the flattened image; ``base`` is its first index."""

    size: Annotated[tuple[Annotated[int, Field(gt=0)], ...], Field(min_length=2)]
    runs: Annotated[str, Field(json_schema_extra=rules.RUNS)]
    order: Literal["C", "F"] = "C"
    base: Literal[0, 1] = 1

    @model_validator(mode="after")
    def _in_range(self) -> Self:
        numbers = self.runs.split()
        if len(numbers) % 2 or not all(number.isdigit() for number in numbers):
            raise ValueError("runs must be pairs of whole numbers 'start length start length ...'")
        total, end = math.prod(self.size), int(self.base)
        for start, length in zip(map(int, numbers[::2]), map(int, numbers[1::2]), strict=True):
            if start < end or length < 1:
                raise ValueError(f"the run '{start} {length}' overlaps the one before it, or is empty")
            end = start + length
        if end > total + self.base:
            raise ValueError(f"runs reach {end - self.base} of {total} voxels")
        return self


class MaskTruth(_Placed):
    """A mask: a label of a stored label map (``path``, ``label``), or run lengths."""

    model_config = ConfigDict(json_schema_extra=rules.MASK)

    path: Inside | None = None
    label: Annotated[int, Field(gt=0)] | None = None
    rle: Runs | None = None

    @model_validator(mode="after")
    def _one_of_two(self) -> Self:
        if (self.rle is None) == (self.path is None) or (self.path is None) != (self.label is None):
            raise ValueError("a mask is a path with a label, or rle: give exactly one")
        if self.path is not None:
            _inside_root(self.path)
        return self


class Labels(_Part):
    """Some of a vocabulary, by index."""

    vocab: Annotated[tuple[Words, ...], Field(min_length=1, json_schema_extra={"uniqueItems": True})]
    positive: Annotated[tuple[int, ...], Field(json_schema_extra={"uniqueItems": True})]

    @model_validator(mode="after")
    def _in_range(self) -> Self:
        if any(not 0 <= index < len(self.vocab) for index in self.positive):
            raise ValueError(f"positive={list(self.positive)} points outside the {len(self.vocab)} words of vocab")
        if len(set(self.positive)) != len(self.positive) or len(set(self.vocab)) != len(self.vocab):
            raise ValueError("a label is given twice")
        return self


class Evidence(_Part):
    """What was measured to know an answer (`data_prep.derived.measures`); a measure of the scan has no names.

    A measure that compares has a positive ``value`` where its name holds for the first structure, beside the second.
    """

    measure: Words
    names: tuple[Words, ...] = ()
    value: float
    unit: Words


class Target(_Part):
    """What is true. None means that it is not given; an empty ``boxes`` or ``masks``, that there certainly is none."""

    model_config = ConfigDict(json_schema_extra=rules.TARGET)

    text: Words | None = None
    options: Annotated[tuple[Words, ...], Field(min_length=2, json_schema_extra={"uniqueItems": True})] | None = None
    choice: Annotated[int, Field(json_schema_extra={"minimum": 0})] | None = None
    labels: Labels | None = None
    value: float | None = None
    quantity: Words | None = None
    unit: Words | None = None
    evidence: Annotated[tuple[Evidence, ...], Field(min_length=1)] | None = None
    boxes: tuple[BoxTruth, ...] | None = None
    points: tuple[PointTruth, ...] | None = None
    polygons: tuple[PolygonTruth, ...] | None = None
    masks: tuple[MaskTruth, ...] | None = None

    @property
    def placed(self) -> tuple[tuple[str, _Placed], ...]:
        """Every piece of geometry with the field that it stands in, such as ``boxes.0``."""
        groups = (("boxes", self.boxes), ("points", self.points), ("polygons", self.polygons), ("masks", self.masks))
        return tuple((f"{name}.{number}", one) for name, some in groups for number, one in enumerate(some or ()))

    @model_validator(mode="after")
    def _hang_together(self) -> Self:
        if all(value is None for value in self.__dict__.values()):
            raise ValueError("a target needs at least one key, such as text, options, boxes or masks")
        if (self.options is None) != (self.choice is None):
            raise ValueError("options and choice are given together")
        if self.options is not None and self.choice is not None:
            if not 0 <= self.choice < len(self.options):
                raise ValueError(f"choice={self.choice} is none of the {len(self.options)} options, counted from 0")
            if len(set(self.options)) != len(self.options):
                raise ValueError("two options are the same")
        if self.value is not None and (self.quantity is None or self.unit is None):
            raise ValueError("a value needs its quantity and its unit")
        return self


class Record(_Part):
    """What is asked of one or more images, and what is true; see DESIGN 3."""

    model_config = ConfigDict(serialize_by_alias=True, json_schema_extra=rules.needs(NEEDS))

    schema_: Literal["m3d.record/1"] = Field(default=SCHEMA, alias="schema")
    id: Identifier
    image_id: Identifier
    patient_id: Identifier
    split: Literal["train", "validation", "test"]
    lang: Annotated[str, Field(pattern=r"^[a-z]{2,3}(-[A-Za-z0-9]+)*$")] = "en"
    source: Origin
    media: Annotated[tuple[Media, ...], Field(min_length=1)]
    task: Annotated[str, Field(pattern=r"^[a-z][a-z0-9]*(\.[a-z0-9]+)*$", json_schema_extra=rules.known_tasks(NEEDS))]
    subtask: str | None = None
    prompt: Prompt
    target: Target
    meta: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _hang_together(self) -> Self:
        ids = [media.image_id for media in self.media]
        if self.image_id not in ids or len(set(ids)) != len(ids):
            raise ValueError(f"image_id={self.image_id!r} must be one of the media, each of them named once: {ids}")
        asked = (self.prompt.text or "", *(str(slot) for slot in self.prompt.slots.values()))
        placeholders = sum(text.count(PLACEHOLDER) for text in asked)
        if placeholders not in (0, len(self.media)):
            raise ValueError(
                f"the prompt has {placeholders} {PLACEHOLDER} for {len(self.media)} media; use all or none"
            )
        missing = [key for key in NEEDS.get(self.task, ()) if getattr(self.target, key) is None]
        if missing:
            raise ValueError(f"task {self.task} needs target.{missing[0]}")
        for where, one in self.target.placed:
            if one.media >= len(self.media):
                raise ValueError(f"target.{where}: media={one.media}, but there are {len(self.media)}")
            _check_geometry(one, self.media[one.media], f"target.{where}")
        return self

    def to_line(self) -> str:
        """The record as one JSON line, without the line's end."""
        return self.model_dump_json(exclude_none=True)


def parse(line: str | bytes, where: str) -> Record:
    """Read and check one line; ``where`` is said in an error, such as ``records.jsonl:7``.

    Raises:
        RecordError: It is no JSON, or breaks a rule.
    """
    try:
        return Record.model_validate_json(line, strict=True)
    except ValidationError as error:
        raise RecordError(f"{where}: {explained(error, Record)}") from None


def explained(error: ValidationError, model: type[BaseModel]) -> str:
    """The first thing wrong, as ``field: what, and what may have been meant``."""
    first = error.errors(include_url=False)[0]
    place = [part for part in first["loc"] if not str(part).startswith("function-")]
    field = ".".join(map(str, place))
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "extra_forbidden":
        known = _known_keys(model, place[:-1])
        close = difflib.get_close_matches(str(place[-1]), known, n=1)
        return f"{field}: unknown key; " + (f"did you mean {close[0]!r}?" if close else f"known: {', '.join(known)}")
    if first["type"] not in ("value_error", "missing", "json_invalid"):
        message += f", got {shortened(first['input'])}"
    return f"{field}: {message}" if field else message


def shortened(value: object, length: int = 60) -> str:
    """A value as it is shown in an error."""
    text = repr(value)
    return text if len(text) <= length else f"{text[: length - 3]}..."


def _known_keys(model: type[BaseModel], path: Sequence[int | str]) -> list[str]:
    """The keys of the part of a model that a path of field names leads to."""
    for step in path:
        field = next((f for name, f in model.model_fields.items() if step in (name, f.alias)), None)
        inner = re.findall(r"data_prep\.record\.(\w+)", str(field.annotation)) if field is not None else []
        model = globals()[inner[0]] if inner else model
    return [field.alias or name for name, field in model.model_fields.items()]


def _inside_root(path: str) -> None:
    """Refuse what could leave the data root, on any system."""
    pure = PurePosixPath(path)
    if pure.is_absolute() or ".." in pure.parts or "\\" in path or ":" in pure.parts[0] or path.startswith("~"):
        raise ValueError(f"path={path!r} must be relative and stay inside the data root, with / between its parts")


def _check_geometry(one: _Placed, media: Media, where: str) -> None:
    size = media.size
    if isinstance(one, MaskTruth):
        if one.rle is not None and one.rle.size != size:
            raise ValueError(f"{where}: rle.size={list(one.rle.size)}, the image has {list(size)}")
    elif isinstance(one, BoxTruth):
        for corner in (one.lo, one.hi):
            _check_inside(corner, one.frame, size, where)
        if not all(low < high for low, high in zip(one.lo, one.hi, strict=True)):
            raise ValueError(f"{where}: lo={list(one.lo)} must lie below hi={list(one.hi)} on every axis")
    elif isinstance(one, PointTruth):
        _check_inside(one.at, one.frame, size, where)
    elif isinstance(one, PolygonTruth):
        for corner in one.points:
            _check_inside(corner, one.frame, size, where)


def _check_inside(at: Sequence[float], frame: Frame, size: Sequence[int], where: str) -> None:
    if len(at) != len(size):
        raise ValueError(f"{where}: {list(at)} has {len(at)} coordinates, the image {len(size)} axes")
    top = {"voxel": [float(side) for side in size], "norm": [1.0] * len(size)}.get(frame)
    if top is not None and not all(0 <= value <= limit for value, limit in zip(at, top, strict=True)):
        raise ValueError(f"{where}: {list(at)} lies outside the image of {list(size)} ({frame} frame)")
