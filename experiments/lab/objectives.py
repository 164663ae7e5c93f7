"""Loss functions for the step builder: (params, batch, key) -> (Weighted, metrics).

`params` holds the models by role, {"student": ..., "teacher": ...}; a batch is one of the pipeline.
"""

from collections.abc import Mapping
from typing import Any

import jax

from jaxdistill import losses
from jaxdistill.models import decoder
from jaxdistill.models.config import DecoderConfig
from jaxdistill.train.step import LossFunction

Batch = Mapping[str, jax.Array]  # a batch of the pipeline, once it is on the devices


def hidden_states(params: decoder.Params, batch: Batch, config: DecoderConfig) -> jax.Array:
    """The decoder's hidden states [B, T, D] on a packed batch."""
    return decoder.apply(
        params,
        batch["tokens"],
        config,
        positions=batch["positions"],
        segment_ids=batch["segment_ids"],
    ).hidden


def cross_entropy(config: DecoderConfig) -> LossFunction:
    """-log p_student(next token), a mean over the targets, from hidden states."""

    def loss_fn(params: Any, batch: Batch, key: jax.Array) -> tuple[losses.Weighted, dict]:
        labels, mask = losses.shift(batch["tokens"], batch["loss_mask"], batch["segment_ids"])
        values = losses.from_hidden.cross_entropy(
            hidden_states(params["student"], batch, config),
            decoder.head(params["student"], config),
            labels,
            vocab_size=config.vocab_size,
            soft_cap=config.logit_soft_cap,
        )
        return losses.token_mean(values, mask), {}

    return loss_fn


def distillation(
    config: DecoderConfig, teacher_config: DecoderConfig, *, temperature: float = 1.0
) -> LossFunction:
    """KL(teacher || student) of the next token, a mean over the targets, from hidden states."""

    def loss_fn(params: Any, batch: Batch, key: jax.Array) -> tuple[losses.Weighted, dict]:
        _, mask = losses.shift(batch["tokens"], batch["loss_mask"], batch["segment_ids"])
        values = losses.from_hidden.forward_kl(
            hidden_states(params["student"], batch, config),
            decoder.head(params["student"], config),
            hidden_states(params["teacher"], batch, teacher_config),
            decoder.head(params["teacher"], teacher_config),
            temperature=temperature,
            vocab_size=config.vocab_size,
            student_soft_cap=config.logit_soft_cap,
            teacher_soft_cap=teacher_config.logit_soft_cap,
        )
        return losses.token_mean(values, mask), {}

    return loss_fn
