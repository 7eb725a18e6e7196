"""Recipes as YAML: typed by a dataclass, checked whole before anything is loaded, overridden by dotted keys."""

import dataclasses
import difflib
import itertools
import types
import typing
from collections.abc import Collection, Hashable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import TypeAdapter, ValidationError

T = TypeVar("T")


def lookup(registry: Mapping[str, T], name: str) -> T:
    """The entry of a registry.

    Raises:
        KeyError: There is none of that name; the message has the closest one.
    """
    if name not in registry:
        raise KeyError(f"unknown name {name!r}; {hint(name, registry)}")
    return registry[name]


def hint(name: str, known: Collection[str]) -> str:
    """``did you mean ...?``, or what there is."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"did you mean {close[0]!r}?" if close else f"known: {', '.join(sorted(known))}"


def config_root() -> Path:
    """The folder of the shipped YAML and DeepSpeed files."""
    root = resources.files("m3d")
    shipped = Path(str(root / "configs"))
    return shipped if shipped.is_dir() else Path(str(root)).parent / "configs"  # an editable install


def load_config(schema: type[T], path: str | Path, overrides: Sequence[str] = ()) -> T:
    """Read a YAML file into a frozen dataclass; ``overrides`` are ``dotted.key=value`` with YAML values.

    ``extends: other.yaml`` in a file takes that file, beside it, first. A path that is not there is looked for among
    the shipped ones, so that ``configs/tiny/chain.yaml`` means the same in a checkout and after ``pip install``.

    Raises:
        FileNotFoundError: The file, or one that it extends, is not there.
        ValueError: A key is unknown, a value has the wrong type, or an override is no ``key=value``.
    """
    values = read_config(find_config(Path(path)))
    for override in overrides:
        key, separator, value = override.partition("=")
        if not separator:
            raise ValueError(f"override {override!r} is no key=value, such as optim.lr=1e-4")
        _set(values, key.split("."), yaml.safe_load(value))
    _check_keys(schema, values, str(path))
    try:
        return TypeAdapter(schema).validate_python(values)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise ValueError(f"{path}: {where}={first['input']!r}: {first['msg']}") from None


def find_config(path: Path) -> Path:
    """The path itself, or the shipped config of that name."""
    if path.is_file() or path.is_absolute():
        return path
    shipped = config_root() / (path.relative_to("configs") if path.parts[:1] == ("configs",) else path)
    return shipped if shipped.is_file() else path


class _Loader(yaml.SafeLoader):
    """Refuses a key given twice, of which YAML would silently keep the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        keys = [key.value for key, _ in node.value]
        twice = next((key for key, _ in node.value if keys.count(key.value) > 1), None)
        if twice is not None:
            raise yaml.constructor.ConstructorError(None, None, f"key {twice.value!r} is given twice", twice.start_mark)
        return super().construct_mapping(node, deep)


def read_config(path: Path, seen: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The values of a YAML file and of those it extends, not checked against any schema."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such config; shipped ones are in {config_root()}")
    if path.resolve() in seen:
        raise ValueError(f"{path} extends itself: {' -> '.join(str(p.name) for p in (*seen, path))}")
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold keys and values, got {type(values).__name__}")
    base = values.pop("extends", None)
    return _merge(read_config(path.parent / base, (*seen, path.resolve())), values) if base else values


def _merge(base: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in new.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if both else value
    return merged


def _set(values: dict[str, Any], keys: list[str], value: object) -> None:
    """Set ``a.b.c``; a number chooses from a list (``sources.0.root``); keys may have dots (``weights.seg.sem``)."""
    place: Any = values
    for key, following in itertools.pairwise([*_with_dots(values, keys), ""]):
        step: Any = key
        if isinstance(place, list):
            if not key.isdigit() or int(key) >= len(place):
                raise ValueError(f"override {'.'.join(keys)}: {key!r} is none of the {len(place)} entries, from 0 on")
            step = int(key)
        elif not isinstance(place, dict):
            raise ValueError(f"override {'.'.join(keys)}: a value stands where {key!r} should be, not a group")
        if not following:
            place[step] = value
            return
        if isinstance(place, dict) and place.get(step) is None:
            place[step] = {}  # not there, or null: a group begins
        place = place[step]


def _with_dots(values: object, keys: Sequence[str]) -> list[str]:
    """The keys, those joined that are one key of the values: the longest that is there."""
    joined, place, rest = list[str](), values, list(keys)
    while rest:
        known: dict[str, Any] = place if isinstance(place, dict) else {}
        if isinstance(place, list):
            known = {str(number): one for number, one in enumerate(place)}
        size = next((n for n in range(len(rest), 1, -1) if ".".join(rest[:n]) in known), 1)
        key, rest = ".".join(rest[:size]), rest[size:]
        joined.append(key)
        place = known.get(key)
    return joined


def _check_keys(kind: Any, values: object, where: str) -> None:  # noqa: ANN401
    """Refuse keys that no dataclass knows, however deep: pydantic would pass over them in silence."""
    for option in _options(kind):
        if isinstance(values, dict) and dataclasses.is_dataclass(option):
            _check_fields(option, values, where)
        elif isinstance(values, dict) and typing.get_origin(option) is dict:
            for key, value in values.items():
                _check_keys(typing.get_args(option)[1], value, f"{where}: {key}")
        elif isinstance(values, list) and typing.get_origin(option) in (list, tuple):
            for index, value in enumerate(values):
                _check_keys(typing.get_args(option)[0], value, f"{where}: {index}")


def _check_fields(schema: Any, values: dict[str, Any], where: str) -> None:  # noqa: ANN401
    kinds = typing.get_type_hints(schema)
    names = [field.name for field in dataclasses.fields(schema)]
    for key, value in values.items():
        if key not in names:
            raise ValueError(f"{where}: unknown key {key!r}; {hint(str(key), names)}")
        _check_keys(kinds[key], value, f"{where}: {key}")


def _options(kind: Any) -> tuple[Any, ...]:  # noqa: ANN401
    """The members of ``X | None``; what is no union is its own one member."""
    return typing.get_args(kind) if typing.get_origin(kind) in (types.UnionType, typing.Union) else (kind,)
