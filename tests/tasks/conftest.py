"""Records of one small volume, and a random choice that takes what it is told to."""

import random
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import pytest

from data_prep.record import Record

T = TypeVar("T")


class Nth(random.Random):
    """Takes the n-th of every list, round and round: all variants are seen without luck."""

    def __init__(self, number: int) -> None:
        super().__init__(0)
        self.number = number

    def choice(self, seq: Sequence[T]) -> T:
        return seq[self.number % len(seq)]


@pytest.fixture
def nth() -> type[Nth]:
    return Nth


@pytest.fixture
def make() -> Callable[..., Record]:
    def record(task: str, target: dict[str, Any], slots: dict[str, Any] | None = None, **fields: Any) -> Record:
        media = {
            "image_id": "i",
            "kind": "volume",
            "path": "images/i.npy",
            "modality": fields.pop("modality", "CT"),
            "shape": (10, 20, 40),
            "axes": "DHW",
            "intensity": {"unit": "norm01"},
        }
        text = fields.pop("text", None)
        prompt = {"text": text} if text else {"template": fields.pop("template", f"m3d.{task}"), "slots": slots or {}}
        given = {"id": "r", "image_id": "i", "patient_id": "p", "split": "test", "source": {"dataset": "test"}}
        return Record.model_validate(
            {**given, "media": (media,), "task": task, "prompt": prompt, "target": target, **fields}
        )

    return record
