"""What becomes of every published parameter: used under our name, known to be dead, or a reason to stop."""

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

Shape = tuple[int, ...]
NewName = Callable[[str], str | None]
DEAD = (
    (r"mask_downscaling\.", "2-D mask prompts, which no 3-D mask can pass"),
    (r"\.(norm_)?cross_attn\.", "layers that MONAI 1.4 and later add and never call"),
    (r"patch_embedding\.cls_token$", "a class token that MONAI 0.8 and earlier kept twice"),
    (r"rotary_emb\.inv_freq$", "a table that is computed anew"),
    (r"\.position_ids$", "a table that is computed anew"),
    (r"pooler\.dense\.", "BERT's pooler, which nothing calls"),
)
SHOWN = 5


@dataclass(frozen=True, kw_only=True)
class KeyReport:
    """Every published name once in ``used`` (by our name), ``dead`` (by reason), ``unused`` or ``mismatched``.

    ``missing`` are names of ours that nothing fills; ``mismatched`` says both shapes.
    """

    used: Mapping[str, str]
    dead: Mapping[str, str]
    missing: tuple[str, ...]
    unused: tuple[str, ...]
    mismatched: Mapping[str, tuple[Shape, Shape]]

    @property
    def wrong(self) -> bool:
        """Whether the conversion would lose or lack something."""
        return bool(self.missing or self.unused or self.mismatched)

    def lines(self) -> Iterator[str]:
        """The report, for people."""
        yield f"used        {len(self.used):5d}"
        yield f"dead        {len(self.dead):5d}"
        for reason, count in Counter(self.dead.values()).items():
            yield f"            {count:5d}  {reason}"
        for kind, names in (("missing", self.missing), ("unused", self.unused)):
            yield f"{kind:11s} {len(names):5d}{_some(names)}"
        shapes = [f"{name} is {_sides(one)}, needed {_sides(other)}" for name, (one, other) in self.mismatched.items()]
        yield f"mismatched  {len(shapes):5d}{_some(shapes)}"

    def refuse(self, where: str) -> None:
        """Stop unless all fits.

        Raises:
            ValueError: Something does not; the message says what, and the way out.
        """
        if not self.wrong:
            return
        found = []
        if self.missing:
            found.append(f"{len(self.missing)} parameters are missing{_some(self.missing)}: fetch all weight files")
        if self.unused:
            found.append(
                f"{len(self.unused)} have no place here{_some(self.unused)}: it is another model, or one trained on "
                "with more parts; leave those out of the file, or convert the model that it is"
            )
        if self.mismatched:
            name, (one, other) = next(iter(self.mismatched.items()))
            found.append(
                f"{len(self.mismatched)} have another shape ({name} is {_sides(one)}, config.json says "
                f"{_sides(other)}): take the config.json and tokenizer that belong to these weights"
            )
        raise ValueError(f"{where}: {'; '.join(found)}")

    def to_dict(self) -> dict[str, Any]:
        """Counts, and what is wrong by name, as JSON."""
        return {
            "used": len(self.used),
            "dead": dict(Counter(self.dead.values())),
            "missing": list(self.missing),
            "unused": list(self.unused),
            "mismatched": {name: [list(one), list(other)] for name, (one, other) in self.mismatched.items()},
        }


def compare(published: Mapping[str, Shape], new_name: NewName, expected: Mapping[str, Shape]) -> KeyReport:
    """Hold published names and shapes against those that a model of ours has."""
    used: dict[str, str] = {}
    dead: dict[str, str] = {}
    unused: list[str] = []
    mismatched: dict[str, tuple[Shape, Shape]] = {}
    taken: set[str] = set()
    for name, shape in published.items():
        ours = _named(name, new_name)
        why = next((reason for pattern, reason in DEAD if re.search(pattern, name)), None)
        if ours is None and why is not None:
            dead[name] = why
        elif ours is None or ours not in expected or ours in taken:
            unused.append(name)
        else:
            taken.add(ours)
            if shape == expected[ours]:
                used[name] = ours
            else:
                mismatched[name] = (shape, expected[ours])
    missing = tuple(sorted(expected.keys() - taken))
    return KeyReport(used=used, dead=dead, missing=missing, unused=tuple(unused), mismatched=mismatched)


def _named(name: str, new_name: NewName) -> str | None:
    """Our name; a stranger keeps its own, which no model of ours has."""
    try:
        return new_name(name)
    except ValueError:
        return name


def _some(names: tuple[str, ...] | list[str]) -> str:
    if not names:
        return ""
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return f" ({', '.join(names[:SHOWN])}{more})"


def _sides(shape: Shape) -> str:
    return "x".join(map(str, shape)) or "scalar"
