"""Configurations are frozen dataclasses; this file reads, writes, overrides and compares them.

A field may hold bool, int, float, str, a Literal, a tuple or list of these, a dict with string
keys, another dataclass, or a union of them such as `float | None`. A key is a dotted path:
`optimizer.learning_rate` is the field `learning_rate` of the dataclass in the field `optimizer`.
"""

import ast
import dataclasses
import difflib
import inspect
import json
import textwrap
import types
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple, TypeVar

Config = TypeVar("Config")

_ABSENT = object()
_NAMES = {bool: "true or false", int: "an integer", float: "a number", str: "text"}


class ConfigError(ValueError):
    """A key or a value that a configuration cannot have, told in one sentence."""


class Option(NamedTuple):
    """One leaf of a configuration: its dotted key, its type, its value now and its help."""

    key: str
    type: Any
    value: Any
    help: str


# ---- Dictionaries ------------------------------------------------------------------------------


def to_dict(config: Any) -> dict[str, Any]:
    """A configuration as nested dictionaries that JSON can hold (tuples become lists).

    >>> @dataclasses.dataclass(frozen=True)
    ... class Example:
    ...     widths: tuple[int, ...] = (3, 4)
    >>> to_dict(Example())
    {'widths': [3, 4]}
    """
    return {f.name: _plain(getattr(config, f.name)) for f in _fields(type(config))}


def from_dict(config_class: type[Config], data: Mapping[str, Any]) -> Config:
    """The configuration that `to_dict` wrote; the inverse of it for every valid configuration.

    Args:
        config_class: the dataclass to build; nested dataclasses are built from their annotations.
        data: nested dictionaries; a field that is missing takes its default.
    Returns: an instance of `config_class`; a whole number given for a float becomes a float.
    Raises: ConfigError, one sentence, for an unknown key, a missing key or a value of wrong type.

    >>> @dataclasses.dataclass(frozen=True)
    ... class Example:
    ...     learning_rate: float = 0.1
    >>> from_dict(Example, {"learning_rate": 1})
    Example(learning_rate=1.0)
    """
    return _build(config_class, data, prefix="")


def apply_overrides(config: Config, overrides: Iterable[str]) -> Config:
    """A copy of `config` with the values of `"key=value"` texts, each read as its field's type.

    All overrides are applied before the dataclasses check themselves, so fields that must agree
    can be changed together. Tuples are written `1,2,3` or as JSON, None as `none`.

    Raises: ConfigError, one sentence, for an unknown key or a value of the wrong type.

    >>> @dataclasses.dataclass(frozen=True)
    ... class Example:
    ...     widths: tuple[int, ...] = ()
    >>> apply_overrides(Example(), ["widths=3,4"])
    Example(widths=(3, 4))
    """
    data = to_dict(config)
    kinds = dict(_leaves(type(config)))
    for override in overrides:
        key, separator, text = override.partition("=")
        key = key.strip()
        if not separator:
            raise ConfigError(f"an override is written key=value, not {override!r}")
        if key not in kinds:
            raise _unknown_key(key, type(config))
        *groups, name = key.split(".")
        target = data
        for group in groups:
            if target[group] is None:  # an optional group that this override switches on
                target[group] = {}
            target = target[group]
        target[name] = _plain(_read(text, kinds[key], key))
    return from_dict(type(config), data)


def diff(old: Any, new: Any) -> list[str]:
    """What differs between two configurations (or their dictionaries), one `key: old -> new` each.

    >>> diff({"seed": 0, "steps": 3}, {"seed": 1, "steps": 3})
    ['seed: 0 -> 1']
    """
    before, after = (
        dict(_flatten(c if isinstance(c, Mapping) else to_dict(c))) for c in (old, new)
    )
    changed = []
    for key in {**before, **after}:
        a, b = before.get(key, _ABSENT), after.get(key, _ABSENT)
        both_nan = a != a and b != b
        if a != b and not both_nan:
            changed.append(f"{key}: {_show(a)} -> {_show(b)}")
    return changed


# ---- Presets, names and help -------------------------------------------------------------------


def preset(presets: Mapping[str, Config], name: str) -> Config:
    """The preset called `name`; ConfigError with the nearest name if there is none.

    >>> preset({"cpu": 1}, "cpu")
    1
    """
    if name not in presets:
        raise ConfigError(f"unknown preset {name!r}: {suggest(name, presets)}")
    return presets[name]


def nearest(name: str, names: Iterable[str]) -> str | None:
    """The name most like `name`, if one is; a name without a dot may be the end of a dotted one.

    >>> nearest("learning_rte", ["seed", "optimizer.learning_rate"])
    'optimizer.learning_rate'
    """
    names = list(names)
    parts = {n if "." in name else n.rpartition(".")[2]: n for n in reversed(names)}
    near = [parts[part] for part in difflib.get_close_matches(name, parts, n=1)]
    near = near or difflib.get_close_matches(name, names, n=1)
    return near[0] if near else None


def suggest(name: str, names: Iterable[str]) -> str:
    """The end of an error about an unknown name: the nearest valid one, or all of them.

    >>> suggest("sed", ["learning_rate", "seed"]), suggest("x", ["learning_rate", "seed"])
    ('did you mean seed?', 'choose from learning_rate, seed')
    """
    names = list(names)
    near = nearest(name, names)
    return f"did you mean {near}?" if near else f"choose from {', '.join(names)}"


def options(config: Any) -> Iterator[Option]:
    """Every leaf of a configuration in the order of its fields, nested ones by dotted key."""
    helps = dict(_helps(type(config)))
    for key, kind in _leaves(type(config)):
        value = config
        for name in key.split("."):
            value = getattr(value, name, None)  # None inside an optional group that is None
        yield Option(key, kind, _plain(value), helps[key])


def field_help(config_class: type) -> dict[str, str]:
    """The help of each field: the string below it, or the comment beside it or right above it."""
    try:
        source = textwrap.dedent(inspect.getsource(config_class))
    except (OSError, TypeError):  # defined at a prompt: there is no source to read
        return {}
    lines = source.splitlines()
    body = typing.cast(ast.ClassDef, ast.parse(source).body[0]).body
    helps = {}
    for node, after in zip(body, [*body[1:], None], strict=True):
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            helps[node.target.id] = _docstring(after) or _comment(lines, node)
    return helps


def describe(kind: Any) -> str:
    """A type in words, as error sentences use it.

    >>> describe(float | None), describe(tuple[int, ...]), describe(Literal["adamw", "sgd"])
    ('a number or none', 'a list of any length (an integer)', "one of 'adamw', 'sgd'")
    """
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if kind in _NAMES:
        return _NAMES[kind]
    if kind is type(None):
        return "none"
    if origin is Literal:
        return f"one of {', '.join(map(repr, arguments))}"
    if _is_union(kind):
        return " or ".join(describe(member) for member in arguments)
    if origin in (tuple, list):
        items = _item_kinds(kind)
        each = [arguments[0]] if items is None else items
        size = "of any length" if items is None else f"of {len(items)}"
        return f"a list {size} ({', '.join(map(describe, each))})"
    if origin is dict:
        return "a dictionary (JSON)"
    if dataclasses.is_dataclass(kind):
        return f"a group of keys ({', '.join(f.name for f in _fields(kind))})"
    raise TypeError(f"a configuration cannot hold {kind}: use the types named in jaxdistill.config")


# ---- Types and values --------------------------------------------------------------------------


def _fields(config_class: Any) -> list[dataclasses.Field[Any]]:
    return [f for f in dataclasses.fields(config_class) if f.init]


def _is_union(kind: Any) -> bool:
    return typing.get_origin(kind) in (typing.Union, types.UnionType)


def _group(kind: Any) -> type | None:
    """The dataclass in `kind` (itself, or the one member of a union), if there is one."""
    members = typing.get_args(kind) if _is_union(kind) else (kind,)
    groups = [m for m in members if dataclasses.is_dataclass(m)]
    return typing.cast(type, groups[0]) if len(groups) == 1 else None


def _item_kinds(kind: Any) -> tuple[Any, ...] | None:
    """The types of a tuple of fixed length; None for a list or tuple of any length."""
    arguments = typing.get_args(kind)
    any_length = typing.get_origin(kind) is list or arguments[1:] == (Ellipsis,)
    return None if any_length else arguments


def _leaves(config_class: type, prefix: str = "") -> Iterator[tuple[str, Any]]:
    kinds = typing.get_type_hints(config_class)
    for field in _fields(config_class):
        group = _group(kinds[field.name])
        if group is None:
            yield prefix + field.name, kinds[field.name]
        else:
            yield from _leaves(group, f"{prefix}{field.name}.")
            if type(None) in typing.get_args(kinds[field.name]):
                yield prefix + field.name, kinds[field.name]


def _helps(config_class: type, prefix: str = "") -> Iterator[tuple[str, str]]:
    kinds, helps = typing.get_type_hints(config_class), field_help(config_class)
    for field in _fields(config_class):
        yield prefix + field.name, helps.get(field.name, "")
        if group := _group(kinds[field.name]):
            yield from _helps(group, f"{prefix}{field.name}.")


def _docstring(node: ast.stmt | None) -> str:
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
        return " ".join(str(node.value.value).split())
    return ""


def _comment(lines: Sequence[str], node: ast.stmt) -> str:
    last = lines[(node.end_lineno or node.lineno) - 1]
    beside = last.encode()[node.end_col_offset :].decode().strip()
    if beside.startswith("#"):
        return beside.lstrip("# ")
    above: list[str] = []
    for line in reversed(lines[: node.lineno - 1]):
        if not line.strip().startswith("#"):
            break
        above.insert(0, line.strip().lstrip("# "))
    return " ".join(above)


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return to_dict(value)
    if isinstance(value, (tuple, list)):
        return [_plain(item) for item in value]
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return value


def _flatten(data: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in data.items():
        if isinstance(value, Mapping) and value:
            yield from _flatten(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def _show(value: Any) -> str:
    return "absent" if value is _ABSENT else "none" if value is None else repr(value)


def _unknown_key(name: str, config_class: Any, prefix: str = "") -> ConfigError:
    key, known = prefix + name, [prefix + leaf for leaf, _ in _leaves(config_class)]
    if inside := [leaf for leaf in known if leaf.startswith(f"{key}.")]:
        return ConfigError(f"{key!r} is a group: set one of its keys, {', '.join(inside)}")
    return ConfigError(f"unknown key {key!r}: {suggest(key, known)}")


def _wrong(key: str, kind: Any, value: Any) -> ConfigError:
    return ConfigError(f"{key} must be {describe(kind)}, not {value!r}")


def _build(config_class: type[Config], data: Any, prefix: str) -> Config:
    if not isinstance(data, Mapping):
        raise _wrong("a configuration", config_class, data)
    kinds, fields = typing.get_type_hints(config_class), _fields(config_class)
    for name in data:
        if name not in [field.name for field in fields]:
            raise _unknown_key(name, config_class, prefix)
    values = {}
    for field in fields:
        key, kind = prefix + field.name, kinds[field.name]
        if field.name in data:
            values[field.name] = _convert(data[field.name], kind, key)
        elif field.default is field.default_factory is dataclasses.MISSING:
            raise ConfigError(f"{key} is missing: it must be {describe(kind)}")
    return config_class(**values)


def _convert(value: Any, kind: Any, key: str) -> Any:
    """`value` as `kind`, or ConfigError; nothing is guessed but int -> float and list -> tuple."""
    origin = typing.get_origin(kind)
    group = _group(kind)
    if group is not None and isinstance(value, Mapping):
        return _build(group, value, f"{key}.")
    if _is_union(kind):
        for member in typing.get_args(kind):
            try:
                return _convert(value, member, key)
            except ConfigError:
                continue
    elif origin is Literal:
        if any(value == choice and type(value) is type(choice) for choice in typing.get_args(kind)):
            return value
    elif origin in (tuple, list) and isinstance(value, (tuple, list)):
        items = _item_kinds(kind) or (typing.get_args(kind)[0],) * len(value)
        if len(items) == len(value):
            pairs = enumerate(zip(value, items, strict=True))
            return origin(_convert(v, k, f"{key}[{i}]") for i, (v, k) in pairs)
    elif origin is dict and isinstance(value, Mapping):
        item = typing.get_args(kind)[1]
        return {name: _convert(v, item, f"{key}[{name!r}]") for name, v in value.items()}
    elif kind is float and type(value) is int:
        return float(value)
    elif type(value) is kind:
        return value
    raise _wrong(key, kind, value)


def _read(text: str, kind: Any, key: str) -> Any:
    """The value that `text` writes for a field of type `kind`, or ConfigError."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if _is_union(kind):
        # None is written as a word and text matches any word: the one goes first, the other last.
        for member in sorted(arguments, key=lambda m: (m is not type(None)) + (m is str)):
            try:
                return _read(text, member, key)
            except ConfigError:
                continue
    elif origin is Literal:
        for choice in arguments:
            if text == str(choice):
                return choice
        raise ConfigError(f"{_wrong(key, kind, text)}: {suggest(text, map(str, arguments))}")
    elif origin is dict or (text[:1] in ("[", "{") and (_group(kind) or origin in (tuple, list))):
        try:
            return _convert(json.loads(text), kind, key)
        except json.JSONDecodeError:
            pass
    elif origin in (tuple, list):
        texts = [item.strip() for item in text.split(",")] if text.strip() else []
        items = _item_kinds(kind) or (arguments[0],) * len(texts)
        if len(items) == len(texts):
            pairs = enumerate(zip(texts, items, strict=True))
            return [_read(t, k, f"{key}[{i}]") for i, (t, k) in pairs]
    elif kind is type(None) and text.lower() == "none":
        return None
    elif kind is bool and text.lower() in ("true", "false"):
        return text.lower() == "true"
    elif kind in (int, float, str):
        try:
            return kind(text)
        except ValueError:
            pass
    raise _wrong(key, kind, text)
