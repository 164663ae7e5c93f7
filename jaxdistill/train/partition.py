"""Which parameters are trained: a nested dict cut in two by path patterns, and its inverse."""

import difflib
import re
from collections.abc import Mapping, Sequence
from typing import Any

from flax.traverse_util import flatten_dict, unflatten_dict

Params = Mapping[str, Any]


def partition(params: Params, trainable: Sequence[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Cuts `params` into (trainable, frozen) nested dicts; `merge` is the inverse.

    Args:
        params: nested dicts of arrays (or of abstract arrays).
        trainable: patterns of leaf paths. `*` stands for any characters within one name,
            `**` for any number of names: "student/layers/**", "**/scale", "embed/embedding".

    Returns:
        Two nested dicts; every leaf is in exactly one of them.

    Raises:
        ValueError: a pattern that matches no leaf; the message names the nearest existing path.

    >>> partition({"embed": 1, "layers": {"mlp": 2, "norm": {"scale": 3}}}, ["layers/**"])
    ({'layers': {'mlp': 2, 'norm': {'scale': 3}}}, {'embed': 1})
    """
    if isinstance(trainable, str):
        raise ValueError(
            f"trainable must be a sequence of patterns, got {trainable!r}; use a tuple"
        )
    leaves = flatten_dict(params, sep="/")
    chosen: set[str] = set()
    for pattern in trainable:
        matched = {path for path in leaves if _matches(pattern, path)}
        if not matched:
            nearest = _nearest_path(pattern, list(leaves))
            raise ValueError(f"the pattern {pattern!r} matches no parameter; {nearest}")
        chosen |= matched
    trained = {path: leaf for path, leaf in leaves.items() if path in chosen}
    frozen = {path: leaf for path, leaf in leaves.items() if path not in chosen}
    return unflatten_dict(trained, sep="/"), unflatten_dict(frozen, sep="/")


def merge(trainable: Params, frozen: Params) -> dict[str, Any]:
    """The tree that `partition` cut; leaves of both, nested dicts merged.

    Raises:
        ValueError: a path that both trees define.

    >>> merge({"layers": {"mlp": 2}}, {"embed": 1, "layers": {"norm": 3}})
    {'layers': {'mlp': 2, 'norm': 3}, 'embed': 1}
    """
    merged = dict(trainable)
    for key, value in frozen.items():
        if key not in merged:
            merged[key] = value
        elif isinstance(value, Mapping) and isinstance(merged[key], Mapping):
            merged[key] = merge(merged[key], value)
        else:
            raise ValueError(f"{key!r} is both trainable and frozen; a leaf belongs to one of them")
    return merged


def _matches(pattern: str, path: str) -> bool:
    """Whether the whole path fits the pattern."""
    pieces = re.split(r"(\*\*/|\*\*|\*)", pattern)
    wildcards = {"**/": "(?:[^/]+/)*", "**": ".*", "*": "[^/]*"}
    expression = "".join(wildcards.get(piece, re.escape(piece)) for piece in pieces)
    return re.fullmatch(expression, path) is not None


def _nearest_path(pattern: str, paths: list[str]) -> str:
    """What to write instead of a pattern that matches nothing."""
    folders = {path[: i + 1] + "**" for path in paths for i, c in enumerate(path) if c == "/"}
    candidates = paths + sorted(folders)
    near = difflib.get_close_matches(pattern, candidates, n=1, cutoff=0.0)
    return f"the nearest that does is {near[0]!r}" if near else "there are no parameters at all"
