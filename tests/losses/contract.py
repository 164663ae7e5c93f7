"""The registry of losses and what an entry says; `test_contract.py` proves the contract for all.

A new loss joins by one `Case` in the `CASES` of `cases/<family>.py`; a new family is a new file
there. `test_every_loss_is_registered` fails for a public loss without one.
"""

import dataclasses
import functools
import importlib
import pkgutil
from collections.abc import Callable

import jax
import numpy as np

from jaxdistill import losses

BATCH = 8  # rows of every batched input: two for each of the four devices

# Public names that are no loss: reductions, containers and helpers, tested in their own files.
NOT_LOSSES = {
    "Gae",
    "Shifted",
    "TeacherSamples",
    "TeacherTopK",
    "Weighted",
    "from_hidden",
    "from_hidden.sample_teacher",
    "from_hidden.top_k_teacher",
    "mask_thought",
    "sample_teacher",
    "sequence_log_prob",
    "sequence_mean",
    "sequence_sum",
    "shift",
    "token_mean",
    "top_k_teacher",
}

# Hidden-state forms that one wrapper makes: `from_hidden.policy_gradient` and others of its making
# stand for them here, and test_policy_family.py holds each against its log-prob form.
WRAPPED = {
    f"from_hidden.{name}"
    for name in (
        "cispo",
        "dapo",
        "dr_grpo",
        "grpo",
        "gspo",
        "hpt",
        "luffy",
        "opsd",
        "ppo_policy",
        "reinforce_plus_plus",
        "rloo",
        "uft",
    )
}


@dataclasses.dataclass(frozen=True)
class Case:
    """One loss under one setting of its options.

    name: "<public name>" or "<public name>/<setting>"; `from_hidden.<name>` for those forms.
    loss: called with the arrays of `inputs` alone; bind options with functools.partial.
    oracle: the formula in float64 numpy, on the same arrays. It shares no code with the loss.
    inputs: (generator, rows) -> numpy arrays, of which all but the `shared` lead with `rows`.
    differentiable: which inputs receive a gradient; all other floating inputs must receive zeros.
    shared: which inputs do not lead with rows, such as a head.
    surrogate: (frozen, inputs) -> values whose derivative in `inputs` at `frozen` is the loss's
      gradient, in float64 numpy: for a loss with stop-gradients inside, compute those parts from
      `frozen`. Default: the oracle of `inputs`.
    extreme: which inputs become +-1e4 in the test of extreme logits; default the differentiable.
    rowwise: whether a row's values depend on that row alone; if not, the tests that cut, permute
      or shard rows are left out.
    tolerance: of value and gradient in float32, relative to the largest of the array.
    """

    name: str
    loss: Callable[..., jax.Array]
    oracle: Callable[..., np.ndarray]
    inputs: Callable[[np.random.Generator, int], tuple[np.ndarray, ...]]
    differentiable: tuple[int, ...]
    shared: tuple[int, ...] = ()
    surrogate: Callable[..., np.ndarray] | None = None
    extreme: tuple[int, ...] | None = None
    rowwise: bool = True
    tolerance: float = 1e-5

    def make(self, seed: int = 0) -> list[np.ndarray]:
        """The inputs, floating ones in float32."""
        arrays = self.inputs(np.random.default_rng(seed), BATCH)
        return [x.astype(np.float32) if is_floating(x) else x for x in arrays]

    def frozen_surrogate(self, frozen: list[np.ndarray]) -> Callable[..., np.ndarray]:
        """Function of the inputs to differentiate at `frozen`."""
        if self.surrogate is None:
            return self.oracle
        return functools.partial(self.surrogate, frozen)


def is_floating(array: np.ndarray) -> bool:
    """Whether the array holds floating numbers, bfloat16 included."""
    return not np.issubdtype(array.dtype, np.integer) and array.dtype != np.bool_


def in_float64(arrays: list[np.ndarray]) -> list[np.ndarray]:
    """Floating arrays widened to what an oracle computes in."""
    return [x.astype(np.float64) if is_floating(x) else x for x in arrays]


def all_cases() -> list[Case]:
    """The `CASES` of every module in `cases`."""
    package = importlib.import_module("tests.losses.cases")
    names = sorted(module.name for module in pkgutil.iter_modules(package.__path__))
    modules = [importlib.import_module(f"tests.losses.cases.{name}") for name in names]
    return [case for module in modules for case in module.CASES]


def public_losses() -> set[str]:
    """Public names of jaxdistill.losses and from_hidden that the registry must hold."""
    hidden = {f"from_hidden.{name}" for name in losses.from_hidden.__all__}
    return ({*losses.__all__} | hidden) - NOT_LOSSES - WRAPPED
