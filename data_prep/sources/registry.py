"""The sources by name: a new one is a frozen dataclass with ``entries()`` (`data_prep.sources.base`) and a line here.

Part of m3d-lamed; import through `m3d`.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from data_prep.sources.base import Source
from data_prep.sources.ct_rate import CTRate
from data_prep.sources.folder import Folder
from data_prep.sources.m3d_cap import M3DCap
from data_prep.sources.m3d_refseg import M3DRefSeg
from data_prep.sources.m3d_seg import M3DSeg
from data_prep.sources.m3d_vqa import M3DVQA
from data_prep.sources.nnunet import NNUNet
from data_prep.sources.openkbp import OpenKBP
from data_prep.sources.phantoms import Phantoms
from data_prep.sources.totalsegmentator import TotalSegmentator

__all__ = ["SOURCES", "build_source"]

SOURCES: Mapping[str, type[Source]] = {
    source.name: source
    for source in (
        M3DCap,
        M3DVQA,
        M3DSeg,
        M3DRefSeg,
        OpenKBP,
        Folder,
        NNUNet,
        TotalSegmentator,
        CTRate,
        Phantoms,
    )
}


def build_source(fields: Mapping[str, Any], *, root: Path = Path()) -> Source:
    """A source from its place in a config: ``kind`` and its own options; a relative ``root`` lies under ``root``.

    Raises:
        ValueError: The kind or an option is unknown, missing, or of the wrong type.
    """
    options = dict(fields)
    kind = str(options.pop("kind", ""))
    if kind not in SOURCES:
        raise ValueError(f"unknown source kind {kind!r}; {_hint(kind, SOURCES)}")
    chosen = SOURCES[kind]
    known = [field.name for field in dataclasses.fields(chosen)]  # type: ignore[arg-type]  # every source is one
    for key in options:
        if key not in known:
            raise ValueError(f"source {kind}: unknown option {key!r}; {_hint(key, known)}")
    if "root" in known:
        options["root"] = root / str(options.get("root", "."))
    try:
        return TypeAdapter(chosen).validate_python(options)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = "".join(f"{part}: " for part in first["loc"])
        what = first["msg"].removeprefix("Value error, ").removeprefix(f"{kind}: ")
        got = "" if first["type"] == "value_error" else f", got {first['input']!r}"
        raise ValueError(f"source {kind}: {where}{what}{got}") from None


def _hint(name: str, known: Collection[str]) -> str:
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"did you mean {close[0]!r}?" if close else f"known: {', '.join(known)}"
