"""Packed equals unpacked, through shift, masks and every reduction.

The model is an embedding that sees the tokens of its own segment up to its own: enough to notice
a label taken from the next sequence, a prompt that is trained on, or a padding that counts.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdistill import losses
from jaxdistill.losses import from_hidden

VOCABULARY, WIDTH = 11, 6
RNG = np.random.default_rng(0)
PARAMETERS = {
    "embedding": RNG.normal(size=(VOCABULARY, WIDTH)).astype(np.float32),
    "head": RNG.normal(size=(VOCABULARY, WIDTH)).astype(np.float32),
}
TEACHER = {name: RNG.normal(size=x.shape).astype(np.float32) for name, x in PARAMETERS.items()}
LENGTHS, PROMPTS = (5, 3, 4), (2, 1, 1)
SEQUENCES = [RNG.integers(0, VOCABULARY, length) for length in LENGTHS]


def unpacked() -> dict[str, np.ndarray]:
    """One sequence a row, padded with a token that would count if it were not masked."""
    batch = {name: np.zeros((3, 7), np.int32) for name in ("tokens", "segment_ids", "loss_mask")}
    for row, (sequence, prompt) in enumerate(zip(SEQUENCES, PROMPTS, strict=True)):
        batch["tokens"][row, : len(sequence)] = sequence
        batch["segment_ids"][row, : len(sequence)] = 1
        batch["loss_mask"][row, prompt : len(sequence)] = 1
    return batch


def packed() -> dict[str, np.ndarray]:
    """All sequences in one row, end to end."""
    tokens = np.concatenate([*SEQUENCES, [7, 7]])
    segment_ids = np.repeat([1, 2, 3, 0], [*LENGTHS, 2])
    parts = [np.arange(n) >= prompt for n, prompt in zip(LENGTHS, PROMPTS, strict=True)]
    loss_mask = np.concatenate([*parts, [0, 0]]).astype(np.int32)
    rows = {"tokens": tokens, "segment_ids": segment_ids, "loss_mask": loss_mask}
    return {name: row[None] for name, row in rows.items()}


def hidden_states(parameters: dict, batch: dict) -> jax.Array:
    """Mean embedding of a position's own segment so far."""
    segment_ids = jnp.asarray(batch["segment_ids"])
    length = segment_ids.shape[1]
    same = segment_ids[:, :, None] == segment_ids[:, None, :]
    seen = (same & jnp.tri(length, dtype=bool)[None]).astype(jnp.float32)
    embedded = parameters["embedding"][batch["tokens"]]
    return jnp.einsum("bts,bsd->btd", seen, embedded) / seen.sum(-1, keepdims=True)


def objective(loss: str, form: str, reduction: str, batch: dict, parameters: dict) -> jax.Array:
    labels, mask = losses.shift(batch["tokens"], batch["loss_mask"], batch["segment_ids"])
    hidden, head = hidden_states(parameters, batch), parameters["head"]
    student = (hidden, head) if form == "hidden" else (hidden @ head.T,)
    if loss == "cross_entropy":
        last: tuple = (labels,)
    else:
        teacher_hidden = hidden_states(TEACHER, batch)
        last = (teacher_hidden, TEACHER["head"])
        last = last if form == "hidden" else (teacher_hidden @ TEACHER["head"].T,)
    values = getattr(from_hidden if form == "hidden" else losses, loss)(*student, *last)
    if reduction == "token_mean":
        return losses.token_mean(values, mask).mean()
    return losses.sequence_mean(values, mask, segment_ids=batch["segment_ids"]).mean()


@pytest.mark.parametrize("reduction", ["token_mean", "sequence_mean"])
@pytest.mark.parametrize("form", ["logits", "hidden"])
@pytest.mark.parametrize("loss", ["cross_entropy", "forward_kl", "reverse_kl"])
def test_packed_equals_unpacked(loss: str, form: str, reduction: str) -> None:
    function = functools.partial(objective, loss, form, reduction)
    values, gradients = zip(
        *(
            jax.jit(jax.value_and_grad(functools.partial(function, batch)))(PARAMETERS)
            for batch in (unpacked(), packed())
        ),
        strict=True,
    )
    assert values[0] > 0.1
    np.testing.assert_allclose(*values, rtol=1e-6)
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-6), *gradients)
