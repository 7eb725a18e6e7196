"""One training or test entry, `m3d.record/1`: geometry as numbers, words as templates with slots.

Part of m3d-lamed; import through `m3d`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

SCHEMA = "m3d.record/1"


@dataclass(frozen=True, kw_only=True)
class Record:
    """What is asked of an image and what is true; see DESIGN 3 for the fields.

    ``slots`` fills the prompt's template; ``target`` holds text, options and choice, boxes or masks by the task;
    ``meta["derivation"]`` says how a derived truth was made.
    """

    id: str
    image_id: str
    patient_id: str
    task: str
    split: str = "train"
    subtask: str | None = None
    slots: Mapping[str, Any] = field(default_factory=dict)
    target: Mapping[str, Any] = field(default_factory=dict)
    meta: Mapping[str, Any] = field(default_factory=dict)
