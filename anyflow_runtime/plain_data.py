"""Dataclasses as plain data (dict, list, str, number, bool, None), and back: what stands in a JSON file.

The reader goes by the fields' annotations; what they do not tell is said by a tag: `{"$dtype": "bfloat16"}`,
`{"$path": ...}`, `{"$class": "module:Name"}`, and `{"$config": "module:Name", ...}` for a registered class. Two keys of
a field's metadata shape the form of a dataclass in it: "inline" puts its keys among those of the outer one, "omit"
names fields that are left out and cannot be given.
"""

from __future__ import annotations

import dataclasses
import sys
import types
import typing
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch

TAGS = {"$config", "$class", "$dtype", "$path"}
_REGISTERED: dict[str, type] = {}


def register(cls: type) -> None:
    """Let plain data name a dataclass by its module path."""
    _REGISTERED[_path_of(cls)] = cls


def to_plain(value: Any, path: str = "", omit: Collection[str] = (), registered: bool = False) -> Any:
    """The plain form of a value.

    Args:
        path: what messages call it.
        omit: fields to leave out.
        registered: inside a registered dataclass, where others have no plain form: nothing has to tell their class.

    Raises:
        TypeError: if it holds something without a plain form; the field is named.
    """
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, type):
        return {"$class": _path_of(value)}
    if _path_of(type(value)) in _REGISTERED:
        return {"$config": _path_of(type(value))} | _plain_fields(value, path, omit, True)
    if dataclasses.is_dataclass(value) and not registered:
        return _plain_fields(value, path, omit, False)
    if isinstance(value, torch.dtype):
        return {"$dtype": str(value).removeprefix("torch.")}
    if isinstance(value, Path):
        return {"$path": str(value)}
    if isinstance(value, (list, tuple)):
        return [to_plain(item, f"{path}[{i}]", (), registered) for i, item in enumerate(value)]
    if isinstance(value, dict) and all(isinstance(key, str) and not key.startswith("$") for key in value):
        return {key: to_plain(item, _join(path, key), (), registered) for key, item in value.items()}
    raise TypeError(f"{path}: {type(value).__name__} has no plain form")


def _plain_fields(config: Any, path: str, omit: Collection[str], registered: bool) -> dict[str, Any]:
    plain: dict[str, Any] = {}
    for f in _fields(config, omit):
        value, left_out = getattr(config, f.name), f.metadata.get("omit", ())
        if f.metadata.get("inline"):
            plain |= _plain_fields(value, path, left_out, registered)
        else:
            plain[f.name] = to_plain(value, _join(path, f.name), left_out, registered)
    return plain


def from_plain(hint: Any, data: Any, path: str = "", omit: Collection[str] = ()) -> Any:
    """The value that `to_plain` wrote, of a field annotated `hint`. Only loaded classes are used, nothing is imported.

    Raises:
        ValueError: naming unknown or missing keys by their dotted path, or a class that is not known here.
        TypeError: naming a key whose value has another type than its annotation says.
    """
    if isinstance(data, Mapping) and not TAGS.isdisjoint(data):
        return _tagged(data, path)
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if data is None and type(None) in arguments:
            return None
        arms = [a for a in arguments if a is not type(None)]
        return from_plain(arms[0] if len(arms) == 1 else Any, data, path, omit)
    if dataclasses.is_dataclass(hint):
        return _build(hint, data, path, omit)
    if origin is tuple:
        if not isinstance(data, (list, tuple)):
            raise TypeError(f"{path}: got {data!r}, expected a list")
        items = [arguments[0]] * len(data) if arguments[-1] is Ellipsis else list(arguments)
        if len(items) != len(data):
            raise ValueError(f"{path}: got {len(data)} values, expected {len(items)}")
        return tuple(from_plain(item, v, f"{path}[{i}]") for i, (item, v) in enumerate(zip(items, data, strict=True)))
    if origin is dict and not isinstance(data, Mapping):
        raise TypeError(f"{path}: got {data!r}, expected an object")
    if hint is float and isinstance(data, int) and not isinstance(data, bool):
        return float(data)
    if hint in (bool, int, float, str) and not (isinstance(data, hint) and isinstance(data, bool) == (hint is bool)):
        raise TypeError(f"{path}: got {data!r}, expected {hint.__name__}")
    if isinstance(data, (list, tuple)):
        return tuple(from_plain(Any, item, f"{path}[{i}]") for i, item in enumerate(data))
    if isinstance(data, Mapping):
        return {key: from_plain(Any, item, _join(path, key)) for key, item in data.items()}
    return data


def _build(cls: Any, data: Any, path: str, omit: Collection[str] = ()) -> Any:
    if not isinstance(data, Mapping):
        raise TypeError(f"{path or 'config'}: got {data!r}, expected an object with keys of {cls.__name__}")
    hints, known = _hints(cls), _keys(cls, omit)
    unknown = [_join(path, key) for key in data if key not in known]
    if unknown:
        raise ValueError(f"{path or 'config'}: got unknown keys {unknown}, expected some of {known}")
    values, missing = {}, []
    for f in _fields(cls, omit):
        hint, left_out, key = hints.get(f.name, Any), f.metadata.get("omit", ()), _join(path, f.name)
        if f.metadata.get("inline"):
            inner = _keys(hint, left_out)
            values[f.name] = _build(hint, {k: v for k, v in data.items() if k in inner}, path, left_out)
        elif f.name in data:
            values[f.name] = from_plain(hint, data[f.name], key, left_out)
        elif f.default is f.default_factory is dataclasses.MISSING:
            missing.append(key)
    if missing:
        raise ValueError(f"{path or 'config'}: lacks {missing}")
    return cls(**values)


def _fields(cls: Any, omit: Collection[str]) -> list[dataclasses.Field]:
    return [f for f in dataclasses.fields(cls) if f.init and f.name not in omit]


def _keys(cls: Any, omit: Collection[str]) -> list[str]:
    """The keys of a dataclass's plain form."""
    keys = []
    for f in _fields(cls, omit):
        keys += _keys(_hints(cls)[f.name], f.metadata.get("omit", ())) if f.metadata.get("inline") else [f.name]
    return keys


def _hints(cls: type) -> dict[str, Any]:
    try:
        return typing.get_type_hints(cls)
    except NameError:  # a name that is local, or imported for type checkers only: values are read by what they are
        return {}


def _tagged(data: Mapping[str, Any], path: str) -> Any:
    if "$path" in data:
        return Path(data["$path"])
    if "$dtype" in data:
        dtype = getattr(torch, data["$dtype"], None)
        if not isinstance(dtype, torch.dtype):
            raise ValueError(f"{path}: got {data['$dtype']!r}, expected the name of a torch dtype")
        return dtype
    kind = "$class" if "$class" in data else "$config"
    cls = _class_at(data[kind])
    if cls is None or (kind == "$config" and _path_of(cls) not in _REGISTERED):
        raise ValueError(f"{path}: got {data[kind]!r}, expected a {kind[1:]} of an imported module")
    return cls if kind == "$class" else _build(cls, {key: data[key] for key in data if key != kind}, path)


def _path_of(cls: type) -> str:
    return f"{cls.__module__}:{cls.__qualname__}"


def _class_at(path: str) -> type | None:
    """The loaded class of that path; else, as classes move between modules, the only one so named in its package."""
    module, _, name = path.partition(":")
    exact = _REGISTERED.get(path) or _inside(sys.modules.get(module), name)
    if exact is not None:
        return exact
    package = module.partition(".")[0]
    loaded = [m for key, m in list(sys.modules.items()) if key.partition(".")[0] == package]
    found = {cls for m in loaded if (cls := _inside(m, name)) is not None and cls.__qualname__ == name}
    return found.pop() if len(found) == 1 else None


def _inside(module: Any, name: str) -> type | None:
    found = module
    for part in name.split("."):
        found = getattr(found, "__dict__", {}).get(part)  # not getattr, which makes lazy packages import
    return found if isinstance(found, type) else None


def _join(path: str, key: str) -> str:
    return f"{path}.{key}" if path else key
