"""Supervised fine-tuning that keeps its entropy: distillation from a flattened copy of itself."""

import jax
import jax.numpy as jnp
from jax import lax

from jaxdistill.losses import checks
from jaxdistill.losses.distribution import expectation, label_value
from jaxdistill.losses.reduce import log_probs


def temperature_for_entropy(
    logits: jax.typing.ArrayLike,
    target_entropy: jax.typing.ArrayLike,
    *,
    min_temperature: float = 1.1,
    max_temperature: float = 1.5,
    iterations: int = 20,
    top_k: int | None = None,
    vocab_size: int | None = None,
) -> jax.Array:
    """The temperature at which a distribution has a given entropy, by bisection.

        t in [min_temperature, max_temperature] with H(softmax(logits / t)) = target_entropy

    The entropy grows with t; a target out of reach gives the nearer end. No gradient flows into
    the result.

    Args:
      logits: `[..., V]`; -inf is a column of probability 0.
      target_entropy: `[...]`, nats.
      min_temperature, max_temperature: above 0, the first not above the second.
      iterations: halvings of the interval, at least 1; 20 take 0.4 below the step of float32.
      top_k: take the entropy of the k most probable tokens alone, renormalised, as the authors do
        with 512: cheaper, and lower than the entropy. Default all.
      vocab_size: columns from here on are padding and do not exist; default all count.

    Returns:
      `[...]`, float32.

    Raises:
      ValueError: an argument of the wrong shape, type or range.

    Source: arXiv 2602.02244.

    Example:
      >>> import numpy as np
      >>> from jaxdistill.losses import entropy, temperature_for_entropy
      >>> logits = np.array([3.0, 1.0, 0.0])
      >>> print(temperature_for_entropy(logits, entropy(logits / 1.25)).round(4))
      1.25
    """
    _check_temperatures(min_temperature, max_temperature)
    checks.check_between("iterations", iterations, 1, float("inf"))
    logits = _most_probable(checks.as_logits("logits", logits, vocab_size), top_k)
    target = checks.as_tokens("target_entropy", target_entropy, logits.shape[:-1])
    return _bisect(logits, target, min_temperature, max_temperature, iterations)


def curio_sft(
    logits: jax.typing.ArrayLike,
    teacher_logits: jax.typing.ArrayLike,
    labels: jax.typing.ArrayLike,
    *,
    distillation_weight: jax.typing.ArrayLike = 1.0,
    entropy_gain: float = 0.5,
    slope: float = 2.0,
    pivot: float = 1.2,
    entropy_floor: float = 0.03,
    min_temperature: float = 1.1,
    max_temperature: float = 1.5,
    top_k: int | None = None,
    vocab_size: int | None = None,
) -> jax.Array:
    """CurioSFT: likelihood, and staying close to a flattened slow copy of the model itself.

        -l + distillation_weight (l - q)^2 / 2
        l = log softmax(logits)_label,  q = log softmax(teacher_logits / t)_label
        t = temperature_for_entropy(teacher_logits, H + entropy_gain s(slope (H - pivot))),
        and min_temperature where H <= entropy_floor;  s the logistic function
        H = entropy of softmax(teacher_logits)

    With weight 1 the push vanishes at l = q + 1 and reverses beyond: a floor of the entropy where
    the teacher is undecided. No gradient flows into the teacher, which the authors set to nearly
    the student (0.99 of it) every 5 steps.

    Args:
      logits: `[..., V]`.
      teacher_logits: `[..., V]`.
      labels: `[...]` integers in [0, vocab_size): outside jit a label out of range raises, inside
        jit it gives NaN, which a mask removes.
      distillation_weight: scalar of at least 0; 0 gives `cross_entropy`.
      entropy_gain: at least 0, nats; the most that is asked for.
      slope, pivot: of the logistic function, in 1/nats and nats; slope at least 0.
      entropy_floor: nats.
      min_temperature, max_temperature, top_k: see `temperature_for_entropy`; top_k is of H too,
        never of l or q.
      vocab_size: columns from here on are padding and do not exist; default all count.

    Returns:
      `[...]`, float32, nats.

    Raises:
      ValueError: an argument of the wrong shape, type or range.

    Source: arXiv 2602.02244 and its code.

    Example:
      >>> import numpy as np
      >>> from jaxdistill.losses import curio_sft
      >>> uniform, labels = np.zeros((1, 4)), np.array([1])
      >>> print(curio_sft(uniform, uniform, labels).round(4))  # l = q: the likelihood alone
      [1.3863]
    """
    checked = checks.as_logits("logits", logits, vocab_size)
    teacher = checks.as_logits("teacher_logits", teacher_logits, vocab_size)
    checks.check_same_shape("teacher_logits", teacher, "logits", checked)
    flattened = flattened_log_probs(
        teacher,
        labels,
        entropy_gain=entropy_gain,
        slope=slope,
        pivot=pivot,
        entropy_floor=entropy_floor,
        min_temperature=min_temperature,
        max_temperature=max_temperature,
        top_k=top_k,
    )
    return near_teacher(log_probs(checked, labels), flattened, distillation_weight)


def flattened_log_probs(
    teacher: jax.Array,
    labels: jax.typing.ArrayLike,
    *,
    entropy_gain: float,
    slope: float,
    pivot: float,
    entropy_floor: float,
    min_temperature: float,
    max_temperature: float,
    top_k: int | None,
) -> jax.Array:
    """q of `curio_sft` from float32 logits `[..., V]`: no gradient flows into them."""
    _check_temperatures(min_temperature, max_temperature)
    checks.check_between("entropy_gain", entropy_gain, 0.0, float("inf"))
    checks.check_between("slope", slope, 0.0, float("inf"))
    teacher = lax.stop_gradient(teacher)
    largest = _most_probable(teacher, top_k)
    entropy = _entropy(largest, jnp.ones(largest.shape[:-1], jnp.float32))
    target = entropy + entropy_gain * jax.nn.sigmoid(slope * (entropy - pivot))
    temperature = _bisect(largest, target, min_temperature, max_temperature, iterations=20)
    temperature = jnp.where(entropy <= entropy_floor, min_temperature, temperature)
    return label_value(jax.nn.log_softmax(teacher / temperature[..., None]), labels)


def near_teacher(
    log_prob: jax.Array, flattened: jax.Array, distillation_weight: jax.typing.ArrayLike
) -> jax.Array:
    """-l + distillation_weight (l - q)^2 / 2."""
    checks.check_between("distillation_weight", distillation_weight, 0.0, float("inf"))
    weight = jnp.asarray(distillation_weight, jnp.float32)
    return weight * 0.5 * jnp.square(log_prob - flattened) - log_prob


def _check_temperatures(low: float, high: float) -> None:
    checks.check_positive("min_temperature", low)
    checks.check_positive("max_temperature", high)
    if low > high:
        raise ValueError(f"min_temperature must be at most max_temperature {high}, but it is {low}")


def _most_probable(logits: jax.Array, top_k: int | None) -> jax.Array:
    """The k largest logits of each position, or all."""
    if top_k is None:
        return logits
    checks.check_between("top_k", top_k, 1, float("inf"))
    return lax.top_k(logits, min(top_k, logits.shape[-1]))[0]


def _entropy(logits: jax.Array, temperature: jax.Array) -> jax.Array:
    log_p = jax.nn.log_softmax(logits / temperature[..., None])
    return -expectation(log_p, log_p)


def _bisect(
    logits: jax.Array, target: jax.Array, low: float, high: float, iterations: int
) -> jax.Array:
    logits, target = lax.stop_gradient(logits), lax.stop_gradient(target)

    def halve(_: int, interval: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        middle = 0.5 * (interval[0] + interval[1])
        too_cold = _entropy(logits, middle) < target
        return jnp.where(too_cold, middle, interval[0]), jnp.where(too_cold, interval[1], middle)

    ends = (jnp.full(target.shape, low, jnp.float32), jnp.full(target.shape, high, jnp.float32))
    # The first step stands outside the loop: under shard_map its result varies over the devices as
    # the loop's must, which constants do not.
    low_end, high_end = lax.fori_loop(1, iterations, halve, halve(0, ends))
    return 0.5 * (low_end + high_end)
