"""Which implementation serves a call: a name serves or raises, "auto" says what it took."""

import functools
import logging
from collections.abc import Callable, Mapping
from typing import Any

IMPLEMENTATIONS = ("pallas", "xla", "reference")

logger = logging.getLogger("jaxdistill.kernels")


class ImplementationError(ValueError):
    """The implementation that was asked for by name does not exist or cannot serve the call."""


def choose(
    operation: str, requested: str, available: Mapping[str, Callable[..., Any]]
) -> Callable[..., Any]:
    """The function of `available` to call; `available` is ordered, best first.

    Raises ImplementationError where `requested` is neither "auto" nor available: a name given
    explicitly never falls back to another.
    """
    if requested == "auto":
        best = next(iter(available))
        _say_once(operation, best)
        return available[best]
    if requested in available:
        return available[requested]
    serve = ", ".join(repr(name) for name in ("auto", *available))
    known = "has no" if requested in IMPLEMENTATIONS else "knows no"
    raise ImplementationError(
        f"{operation} {known} implementation {requested!r}: choose one of {serve}"
    )


@functools.cache
def _say_once(operation: str, chosen: str) -> None:
    logger.info("%s: implementation='auto' chose %r", operation, chosen)
