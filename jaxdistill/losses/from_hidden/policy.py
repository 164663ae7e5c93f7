"""The policy objectives as functions of hidden states and a head, without the logits in memory.

They need no more of the policy than each token's log-probability and at times the entropy, so the
form of each is the same: run the head, then call the objective.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import jax

from jaxdistill import kernels
from jaxdistill.losses import (
    checks,
    hybrids,
    mixtures,
    policy,
    policy_distillation,
    policy_objectives,
    ppo,
)
from jaxdistill.losses.reduce import Weighted

__all__ = [
    "chord",
    "cispo",
    "dapo",
    "dr_grpo",
    "grpo",
    "gspo",
    "hpt",
    "iw_sft",
    "luffy",
    "on_policy_distillation",
    "opsd",
    "pi_distill",
    "policy_gradient",
    "ppo_policy",
    "reinforce_plus_plus",
    "rloo",
    "srft",
    "uft",
]

DOCUMENTATION = """`losses.{name}` of the log-probabilities of hidden states and a head.

    losses.{name}(from_hidden.log_probs(hidden, head, labels), ...)

    Its other arguments, result, errors and stopped gradients are those of `losses.{name}`; the
    gradient flows into hidden and head. An entropy that is needed comes from the head.

    Args:
      hidden: `[..., T, D]`, whose position t predicts labels[t].
      head: `[V, D]` ("vd") or `[D, V]` ("dv").
      labels: `[..., T]` integers in [0, vocab_size), any label where the mask is 0.
      temperature: scalar above 0, that of the sampling; no gradient flows into it.
      vocab_size: columns from here on are padding and do not exist; default all count.
      soft_cap: bounds the raw logits; default no bound.
      head_layout, implementation: see `jaxdistill.kernels.linear_cross_entropy`.

    Example:
      >>> import inspect
      >>> from jaxdistill.losses import from_hidden
      >>> print(*list(inspect.signature(from_hidden.{name}).parameters)[:3])
      hidden head labels
    """


def _run_head(
    hidden: jax.typing.ArrayLike,
    head: jax.typing.ArrayLike,
    labels: jax.typing.ArrayLike,
    *,
    temperature: jax.typing.ArrayLike = 1.0,
    vocab_size: int | None = None,
    soft_cap: float | None = None,
    head_layout: str = "vd",
    implementation: str = "auto",
    with_entropy: bool = False,
) -> Any:
    return kernels.linear_cross_entropy(
        hidden,
        head,
        labels,
        temperature=temperature,
        vocab_size=vocab_size,
        soft_cap=soft_cap,
        head_layout=head_layout,
        implementation=implementation,
        with_entropy=with_entropy,
    )


HEAD_PARAMETERS = inspect.signature(_run_head).parameters
HEAD_OPTIONS = tuple(HEAD_PARAMETERS)[3:-1]


def _from_hidden(objective: Callable[..., Any]) -> Callable[..., Any]:
    """The objective with (hidden, head, labels) in the place of its first argument, log_prob."""

    @functools.wraps(objective)
    def form(hidden: Any, head: Any, labels: Any, *arrays: Any, **options: Any) -> Any:
        of_head = {name: options.pop(name) for name in HEAD_OPTIONS if name in options}
        weight = options.get("entropy_weight", 0.0)
        with_entropy = not checks.is_concrete(weight) or weight != 0
        out = _run_head(hidden, head, labels, with_entropy=with_entropy, **of_head)
        if with_entropy:
            options["entropy"] = out.entropy
        return objective(out.log_prob, *arrays, **options)

    signature = inspect.signature(objective)
    own = list(signature.parameters.values())[1:]
    merged = [*list(HEAD_PARAMETERS.values())[:-1], *own]
    merged.sort(key=lambda parameter: parameter.kind)
    form.__signature__ = signature.replace(parameters=merged)  # type: ignore[attr-defined]
    form.__module__ = __name__
    form.__doc__ = DOCUMENTATION.format(name=objective.__name__)
    return form


chord = _from_hidden(mixtures.chord)
cispo = _from_hidden(policy_objectives.cispo)
dapo = _from_hidden(policy_objectives.dapo)
dr_grpo = _from_hidden(policy_objectives.dr_grpo)
grpo = _from_hidden(policy_objectives.grpo)
gspo = _from_hidden(policy_objectives.gspo)
hpt = _from_hidden(hybrids.hpt)
iw_sft = _from_hidden(mixtures.iw_sft)
luffy = _from_hidden(hybrids.luffy)
on_policy_distillation = _from_hidden(policy_distillation.on_policy_distillation)
opsd = _from_hidden(policy_distillation.opsd)
policy_gradient = _from_hidden(policy.policy_gradient)
ppo_policy = _from_hidden(ppo.ppo_policy)
reinforce_plus_plus = _from_hidden(ppo.reinforce_plus_plus)
rloo = _from_hidden(policy_objectives.rloo)
uft = _from_hidden(mixtures.uft)


def pi_distill(
    teacher_hidden: jax.typing.ArrayLike,
    student_hidden: jax.typing.ArrayLike,
    head: jax.typing.ArrayLike,
    labels: jax.typing.ArrayLike,
    old_teacher_log_prob: jax.typing.ArrayLike | None,
    advantage: jax.typing.ArrayLike,
    mask: jax.typing.ArrayLike,
    *,
    temperature: jax.typing.ArrayLike = 1.0,
    vocab_size: int | None = None,
    soft_cap: float | None = None,
    head_layout: str = "vd",
    implementation: str = "auto",
    **options: Any,
) -> Weighted:
    """`losses.pi_distill` of one model's hidden states with and without the information in view.

    Args:
      teacher_hidden, student_hidden: `[..., T, D]`, at the positions that predict the same labels.
      head: `[V, D]` ("vd") or `[D, V]` ("dv"), of both.
      labels: `[..., T]` integers in [0, vocab_size).
      old_teacher_log_prob, advantage, mask, options: as for `losses.pi_distill`.
      temperature, vocab_size, soft_cap, head_layout, implementation: as for `from_hidden.grpo`.

    Returns:
      Weighted, as `losses.pi_distill`.

    Raises:
      ValueError: an argument of the wrong shape, an unknown name, or an option out of range.

    Example:
      >>> import numpy as np
      >>> from jaxdistill.losses import from_hidden
      >>> hidden, head = np.ones((1, 2, 4), np.float32), np.zeros((8, 4), np.float32)
      >>> labels, mask = np.array([[0, 7]]), np.ones((1, 2))
      >>> print(from_hidden.pi_distill(hidden, hidden, head, labels, None, np.ones(1), mask).mean())
      -1.0
    """
    teacher, student = (
        _run_head(
            hidden,
            head,
            labels,
            temperature=temperature,
            vocab_size=vocab_size,
            soft_cap=soft_cap,
            head_layout=head_layout,
            implementation=implementation,
        ).log_prob
        for hidden in (teacher_hidden, student_hidden)
    )
    return policy_distillation.pi_distill(
        teacher, old_teacher_log_prob, student, advantage, mask, **options
    )


def srft(
    hidden: jax.typing.ArrayLike,
    head: jax.typing.ArrayLike,
    labels: jax.typing.ArrayLike,
    advantage: jax.typing.ArrayLike,
    mask: jax.typing.ArrayLike,
    is_demo: jax.typing.ArrayLike,
    correct: jax.typing.ArrayLike,
    *,
    temperature: jax.typing.ArrayLike = 1.0,
    vocab_size: int | None = None,
    soft_cap: float | None = None,
    head_layout: str = "vd",
    implementation: str = "auto",
    **options: Any,
) -> Weighted:
    """`losses.srft` of the log-probabilities and the entropies of hidden states and a head.

    Args:
      hidden, head, labels, temperature, vocab_size, soft_cap, head_layout, implementation: as for
        `from_hidden.grpo`.
      advantage, mask, is_demo, correct, options: as for `losses.srft`.

    Returns:
      Weighted, in sequences.

    Raises:
      ValueError: an argument of the wrong shape, or an option out of range.

    Example:
      >>> import numpy as np
      >>> from jaxdistill.losses import from_hidden
      >>> hidden, head = np.ones((1, 2, 4), np.float32), np.zeros((8, 4), np.float32)
      >>> demo, mask = np.array([True]), np.ones((1, 2))
      >>> args = hidden, head, np.array([[0, 7]]), np.zeros(1), mask, demo, demo
      >>> print(from_hidden.srft(*args, divisor=2).mean().round(4))  # 0.5 / 8 log 8
      0.13
    """
    out = _run_head(
        hidden,
        head,
        labels,
        temperature=temperature,
        vocab_size=vocab_size,
        soft_cap=soft_cap,
        head_layout=head_layout,
        implementation=implementation,
        with_entropy=True,
    )
    return hybrids.srft(out.log_prob, advantage, mask, is_demo, correct, out.entropy, **options)
