"""Configs: frozen, hashable, printable trees that build the objects they describe.

A config is a keyword-only frozen dataclass. `InstantiateConfig._target` names the class, `setup()` builds it, and
`derive_config` makes a changed copy by rebuilding every node on the way, so validation in `__post_init__` runs again.

    @dataclass(frozen=True, kw_only=True)
    class BlurConfig(InstantiateConfig):
        _target: type[Blur] = field(default_factory=lambda: Blur)  # a factory, so Blur may be defined later
        radius: int = 3

Their plain form is that of `plain_data`.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Mapping
from dataclasses import dataclass
from types import FunctionType, ModuleType
from typing import Any, NoReturn, TypeVar

from .plain_data import from_plain, register, to_plain

T = TypeVar("T")


class FrozenDict(dict[str, Any]):
    """Settings that refuse changes, by key or as attributes; hashes by content.

    The config of a model and of a scheduler, and what dict-valued config fields are stored as.
    """

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"config has no entry {name!r} (known: {', '.join(map(str, self))})") from None

    def __hash__(self) -> int:  # type: ignore[override]
        return hash(frozenset(self.items()))

    def _refuse(self, *_: Any, **__: Any) -> NoReturn:
        raise TypeError(
            "a config cannot change; make a changed copy: derive_config, or from_config(config, name=value)"
        )

    __setattr__ = __setitem__ = __delattr__ = __delitem__ = __ior__ = _refuse
    clear = pop = popitem = setdefault = update = _refuse

    def __deepcopy__(self, memo: dict[int, Any]) -> FrozenDict:
        return FrozenDict((copy.deepcopy(key, memo), copy.deepcopy(value, memo)) for key, value in self.items())

    def __reduce__(self) -> tuple[type[FrozenDict], tuple[dict]]:
        return FrozenDict, (dict(self),)


class PrintableConfig:
    """Base of every config: a readable multi-line `str()`, hashable fields and conversion to plain data.

    Subclasses are dataclasses with `frozen=True, kw_only=True`. Before their `__post_init__` runs, list and set fields
    become tuples and frozensets and dict fields become `FrozenDict`, so that the config hashes.

    Raises:
        TypeError: at construction, if a field holds something else that cannot be hashed; the field is named.
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        register(cls)
        validate = cls.__dict__.get("__post_init__")
        if validate is None:
            return

        # A subclass that forgets super().__post_init__() must not lose the promise to hash.
        @functools.wraps(validate)
        def freeze_then_validate(self: PrintableConfig, *args: Any) -> None:
            _freeze_fields(self)
            validate(self, *args)

        cls.__post_init__ = freeze_then_validate  # type: ignore[method-assign]

    def __post_init__(self) -> None:
        _freeze_fields(self)

    def __str__(self) -> str:
        lines = [f"{type(self).__name__}:"]
        for key in _field_names(self):
            value = getattr(self, key)
            text = "[" + "\n".join(map(str, value)) + "]" if isinstance(value, tuple) else str(value)
            lines += f"{key}: {text}".split("\n")
        return "\n    ".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """Plain data (dict, list, str, number, bool, None) from which `from_dict` rebuilds an equal config.

        Raises:
            TypeError: if a field holds a value with no plain form; the field is named.
        """
        return to_plain(self, type(self).__name__)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Any:
        """Rebuild the config that `to_dict` wrote; only classes already imported are used, nothing is imported.

        Raises:
            ValueError, TypeError: see `from_plain`; also if the data names a class that is no `cls`.
        """
        config = from_plain(Any, data, "data")
        if not isinstance(config, cls):
            raise ValueError(f"data: got plain form of {type(config).__name__}, expected that of {cls.__name__}")
        return config


@dataclass(frozen=True, kw_only=True)
class InstantiateConfig(PrintableConfig):
    """A config that carries the class it describes.

    Args:
        _target: called as `_target(config, **kwargs)` by `setup`. An abstract class raises TypeError there.
    """

    _target: type

    def setup(self, **kwargs: Any) -> Any:
        """Build the described object: `_target(self, **kwargs)`."""
        return self._target(self, **kwargs)


def derive_config(base_config: T, **changes: Any) -> T:
    """A deep copy of `base_config` with nested overrides; the base is never changed.

    A dict value walks into a dict or an object with attributes, any other value replaces what was there as it is.
    Every dataclass on the way is rebuilt, so its `__post_init__` checks the new values together.

        derive_config(pipeline, name="fast", diffusion_model=dict(scheduler=dict(shift=3.0)))

    Raises:
        KeyError: unknown field or dict key, with its dotted path.
        TypeError: a dict given for a field that holds None, a number, a string, a list or a tuple.
    """
    return _patched(base_config, changes, type(base_config).__name__)


def _patched(target: Any, patch: Mapping[Any, Any], path: str) -> Any:
    current = _settable(target)
    for key in patch:
        if key not in current:
            kind = "key" if isinstance(target, dict) else "field"
            name = str(key) if isinstance(target, dict) else f"{type(target).__name__}.{key}"
            raise KeyError(f"unknown {kind} at {path}: {name} (known: {', '.join(map(str, current)) or 'none'})")

    values = {}
    for key, value in patch.items():
        if not isinstance(value, dict):
            values[key] = value
        elif _can_walk_into(current[key]):
            values[key] = _patched(current[key], value, f"{path}.{key}")
        else:
            raise TypeError(
                f"{path}.{key} holds {type(current[key]).__name__}, which a dict patch cannot walk into; "
                "pass the new value itself"
            )

    memo: dict[int, Any] = {}
    if dataclasses.is_dataclass(target) and not isinstance(target, type):
        # Fields computed by the class itself (init=False) are left for __post_init__ to compute again.
        kept = {key: copy.deepcopy(value, memo) for key, value in current.items() if key not in values}
        return type(target)(**kept, **values)
    if isinstance(target, dict):
        cls = FrozenDict if isinstance(target, FrozenDict) else dict
        return cls((key, values[key] if key in values else copy.deepcopy(current[key], memo)) for key in target)
    changed = copy.deepcopy(target, memo)
    for key, value in values.items():
        setattr(changed, key, value)
    return changed


def _settable(target: Any) -> dict[Any, Any]:
    """What a patch may name in `target`, with the present values."""
    if isinstance(target, dict):
        return dict(target)
    if dataclasses.is_dataclass(target):
        return {field.name: getattr(target, field.name) for field in dataclasses.fields(target) if field.init}
    return dict(vars(target))


def _can_walk_into(value: Any) -> bool:
    if isinstance(value, dict):
        return True
    # Classes, modules and functions have a __dict__ as well, but their attributes are code, not settings.
    if isinstance(value, (type, ModuleType, FunctionType)):
        return False
    return hasattr(value, "__dict__") or dataclasses.is_dataclass(value)


def _field_names(config: Any) -> list[str]:
    if dataclasses.is_dataclass(config):
        return [field.name for field in dataclasses.fields(config) if hasattr(config, field.name)]
    return list(vars(config))


def _freeze_fields(config: Any) -> None:
    # A field with init=False and no default is absent until __post_init__ sets it.
    for name in _field_names(config):
        value = getattr(config, name)
        frozen = _frozen(value)
        try:
            hash(frozen)
        except TypeError as error:
            raise TypeError(
                f"{type(config).__name__}.{name}: a config field must be hashable, got {type(value).__name__} "
                f"({error}); use a frozen dataclass, tuple, str, number or None"
            ) from error
        if frozen is not value:
            object.__setattr__(config, name, frozen)


def _frozen(value: Any) -> Any:
    if isinstance(value, dict):
        return FrozenDict((key, _frozen(item)) for key, item in value.items())
    if isinstance(value, list):
        return tuple(_frozen(item) for item in value)
    if type(value) is tuple and any(isinstance(item, (list, dict, set, tuple)) for item in value):
        return tuple(_frozen(item) for item in value)
    if isinstance(value, set):
        return frozenset(value)
    return value
