"""What a language model is worth: held-out perplexity, KL to its teacher, speed, and a sample."""

import functools
import json
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
from etils import epath

from experiments.lab.objectives import Batch, hidden_states
from jaxdistill import losses
from jaxdistill.data import chat, pipeline
from jaxdistill.data.tokenizers import Tokenizer
from jaxdistill.models import decoder
from jaxdistill.models.config import DecoderConfig
from jaxdistill.rollout import sampler
from jaxdistill.workdir import write_atomically


class Model(NamedTuple):
    """Parameters and the configuration they belong to."""

    params: decoder.Params
    config: DecoderConfig


class Quality(NamedTuple):
    """exp of the mean negative log-prob of a token; mean KL(teacher || model), in nats a token."""

    perplexity: float
    kl_to_teacher: float


class Sample(NamedTuple):
    """An answer, and how fast it was written: new tokens a second, compilation left out."""

    text: str
    tokens_per_second: float


def quality(model: Model, teacher: Model, batches: Iterable[pipeline.Batch]) -> Quality:
    """Perplexity and KL to the teacher over every target token of the batches."""
    scores = [
        jax.device_get(_score(model.params, teacher.params, batch, model.config, teacher.config))
        for batch in batches
    ]
    negative_log_prob, kl = (_mean(column) for column in zip(*scores, strict=True))
    return Quality(math.exp(negative_log_prob), kl)


def _mean(parts: Sequence[losses.Weighted]) -> float:
    """The mean over all parts; added in float64, since float32 loses digits over many batches."""
    return float(sum(float(p.sum) for p in parts) / sum(float(p.weight) for p in parts))


@functools.partial(jax.jit, static_argnames=("config", "teacher_config"))
def _score(
    params: decoder.Params,
    teacher_params: decoder.Params,
    batch: Batch,
    config: DecoderConfig,
    teacher_config: DecoderConfig,
) -> tuple[losses.Weighted, losses.Weighted]:
    """Negative log-prob and KL to the teacher, summed over the targets of a batch."""
    labels, mask = losses.shift(batch["tokens"], batch["loss_mask"], batch["segment_ids"])
    hidden = hidden_states(params, batch, config)
    head = decoder.head(params, config)
    negative_log_prob = losses.from_hidden.cross_entropy(
        hidden, head, labels, vocab_size=config.vocab_size, soft_cap=config.logit_soft_cap
    )
    kl = losses.from_hidden.forward_kl(
        hidden,
        head,
        hidden_states(teacher_params, batch, teacher_config),
        decoder.head(teacher_params, teacher_config),
        vocab_size=config.vocab_size,
        student_soft_cap=config.logit_soft_cap,
        teacher_soft_cap=teacher_config.logit_soft_cap,
    )
    return losses.token_mean(negative_log_prob, mask), losses.token_mean(kl, mask)


def answer(model: Model, tokenizer: Tokenizer, prompt: str, *, new_tokens: int) -> Sample:
    """The greedy answer to a user's message, by the chat template, and the speed of writing."""
    text = chat.render(tokenizer, [{"role": "user", "content": prompt}], add_generation_prompt=True)
    generate = functools.partial(
        sampler.generate,
        model.params,
        model.config,
        [tokenizer.encode(text)],
        max_new_tokens=new_tokens,
        temperature=0.0,
    )
    stop_tokens = () if tokenizer.eos_id is None else (tokenizer.eos_id,)
    tokens = generate(stop_tokens=stop_tokens).tokens[0]
    start = time.perf_counter()
    # Compiled by now; without stop tokens all models write the same number.
    written = len(generate().tokens[0])
    seconds = time.perf_counter() - start
    shown = tokens[:-1] if tokens[-1] in stop_tokens else tokens
    return Sample(tokenizer.decode(shown).strip(), written / seconds)


def count_parameters(params: decoder.Params) -> int:
    """Numbers in the tree."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))


class Results:
    """Rows of measurements in a JSON file; a row that is there is not measured again.

    Args:
        path: the file, made by the first measurement.
    """

    def __init__(self, path: epath.PathLike) -> None:
        self._path = epath.Path(path)
        self.rows: dict[str, dict[str, Any]] = {}
        if self._path.exists():
            self.rows = json.loads(self._path.read_text())

    def measure(self, name: str, measurement: Callable[[], Mapping[str, Any]]) -> dict[str, Any]:
        """The row of that name, measured and written if it is not there yet."""
        if name not in self.rows:
            self.rows[name] = dict(measurement())
            write_atomically(self._path, json.dumps(self.rows, indent=2))
        return self.rows[name]
