"""By what a mask is asked for: the record's own words, what a user points at, or both together.

Each kind is a row of its own wherever a task and a record have one: ``seg.sem by point``. The simulated users of
`m3d.bench.simulated` say what each kind needs.
"""

from collections.abc import Sequence

from m3d.config import hint

__all__ = ["CLICKS", "MASK", "MOST_CLICKS", "PARTS", "TEXT", "by_of", "check_kinds", "named", "parts_of", "task_of"]

TEXT, MASK, CLICKS, BY = "text", "mask", "clicks", " by "
SLICE_BOX = "slice_box"
MOST_CLICKS = 10
POINTING = ("point", "points", "scribble", CLICKS)
PLACES = ((TEXT,), (MASK,), ("box", SLICE_BOX), POINTING)
"""What can be said together, in the order in which it is written: one of each."""
PARTS = tuple(part for place in PLACES for part in place)


def parts_of(kind: str) -> tuple[str, ...]:
    """What is said together: ``text+box`` is a text and a box."""
    return tuple(kind.split("+"))


def check_kinds(kinds: Sequence[str]) -> None:
    """See that every kind is one.

    Raises:
        ValueError: One is unknown, contradicts itself or is written in another order, or is there twice.
    """
    if not kinds:
        raise ValueError(f"prompts is empty; leave it out for [{TEXT}], or give some of {', '.join(PARTS)}")
    for kind in kinds:
        _check_kind(kind)
    if twice := next((kind for kind in kinds if list(kinds).count(kind) > 1), None):
        raise ValueError(f"prompts has {twice!r} twice; ask once")


def _check_kind(kind: str) -> None:
    parts = parts_of(kind)
    for part in parts:
        if part not in PARTS:
            raise ValueError(f"unknown kind of prompt {part!r}; {hint(part, PARTS)}")
    for place in PLACES:
        several = [part for part in parts if part in place]
        if len(several) > 1:
            raise ValueError(f"prompts: {kind!r} has {' and '.join(several)}, of which one is taken; ask by each alone")
    if SLICE_BOX in parts and set(parts) & set(POINTING):
        raise ValueError(f"prompts: {kind!r} points at what lies outside its box of one slice; take box in its place")
    ordered = "+".join(sorted(parts, key=PARTS.index))
    if kind != ordered:
        raise ValueError(f"prompts: {kind!r} is written {ordered!r}, so that it has one name everywhere")


def named(name: str, by: str) -> str:
    """What a task, or the id of a record, is called where it is asked by this kind; by its text it keeps its name."""
    return name if by == TEXT else f"{name}{BY}{by}"


def task_of(name: str) -> str:
    """The task of such a name: ``seg.sem`` of ``seg.sem by point``."""
    return name.partition(BY)[0]


def by_of(name: str) -> str:
    """The kind of such a name; a name without one is asked by its text."""
    return name.partition(BY)[2] or TEXT
