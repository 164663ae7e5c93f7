"""The statistics of one sweep over the vocabulary: of parts of it together, and what they give.

Write KL(p||q), with (p, q) = (teacher, student) for the forward and (student, teacher) for the
reverse. With running maxima m and totals Z of both, a sweep keeps

    A = sum exp(p - m_p) ((p - m_p) - (q - m_q));    KL = A / Z_p - log Z_p + log Z_q

so the terms stay near the size of the divergence however large the logits.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxdistill.kernels import tiles

# Which KLs a kind is the mean of: True is the forward one.
DIRECTIONS = {"forward_kl": (True,), "reverse_kl": (False,), "symmetric_kl": (True, False)}


class Running(NamedTuple):
    """Statistics of the columns seen so far, of one shape, a number a token."""

    student: tiles.OnlineSoftmax
    teacher: tiles.OnlineSoftmax
    differences: tuple[jax.Array, ...]  # A of the module's docstring, for each direction


class Sums(NamedTuple):
    """What the backward pass needs of the whole vocabulary, a number a token."""

    student: jax.Array  # log-sum-exp
    teacher: jax.Array
    slopes: jax.Array


def own_columns(head: jax.Array, vocab_axis: int, vocab_size: int, axis_name: str) -> jax.Array:
    """How many of the columns a device has of a split head count; on the last ones maybe none."""
    own = head.shape[vocab_axis]
    return jnp.clip(vocab_size - lax.axis_index(axis_name) * own, 0, own)


def over_devices(kind: str, running: Running, axis_name: str) -> Running:
    """Statistics of the columns of all devices."""
    largest, summed = (functools.partial(x, axis_name=axis_name) for x in (lax.pmax, lax.psum))
    return together(kind, running, largest, summed)


def together(kind: str, running: Running, largest: Callable, summed: Callable) -> Running:
    """Statistics of parts of the vocabulary, joined by maxima and sums over the parts."""
    student, student_shift = tiles.joined(running.student, largest, summed)
    teacher, teacher_shift = tiles.joined(running.teacher, largest, summed)
    differences = []
    for forward, own in zip(DIRECTIONS.get(kind, ()), running.differences, strict=True):
        p_total, p_shift, q_shift = running.teacher.total, teacher_shift, student_shift
        if not forward:
            p_total, p_shift, q_shift = running.student.total, q_shift, p_shift
        moved = jnp.exp(p_shift) * (own + p_total * (p_shift - q_shift))
        differences.append(summed(moved))
    return Running(student, teacher, tuple(differences))


def of_kl(kind: str, running: Running) -> tuple[jax.Array, Sums]:
    """The divergence of a plain KL, or of the mean of both, and what its gradient needs."""
    divergence = slopes = jnp.zeros_like(running.student.total)
    directions = DIRECTIONS[kind]
    for forward, difference in zip(directions, running.differences, strict=True):
        p, q = running.teacher, running.student
        if not forward:
            p, q = q, p
        kl = difference / p.total - jnp.log(p.total) + jnp.log(q.total)
        divergence += kl / len(directions)
        slopes += (-jnp.ones_like(kl) if forward else kl) / len(directions)
    return divergence, Sums(running.student.log_sum_exp(), running.teacher.log_sum_exp(), slopes)
