"""Our decoder on one sequence, compiled once per configuration."""

import functools
import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from jaxdistill.models import decoder


@functools.partial(jax.jit, static_argnums=2)
def _logits(params, tokens, config):
    return decoder.logits(params, decoder.apply(params, tokens, config).hidden, config)


def decoder_logits(config, params, tokens):
    """Logits [tokens, vocabulary] of one sequence of ids."""
    return np.asarray(_logits(params, jnp.asarray(tokens, jnp.int32)[None], config))[0]


def random_params(config, seed=0):
    """Parameters of a configuration drawn by numpy: nothing to compile."""
    generator = np.random.default_rng(seed)

    def draw(path, shape):
        # Scales near one and attention of some contrast, so that a wrong rotation shows in logits.
        values = generator.uniform(0.5, 1.5, shape)
        return values if path.endswith("scale") else generator.normal(0, 0.4, shape)

    leaves = flatten_dict(decoder.abstract_params(config), sep="/")
    arrays = {path: draw(path, leaf.shape).astype(np.float32) for path, leaf in leaves.items()}
    return unflatten_dict(arrays, sep="/")


def traced_peak(function, *arguments):
    """(what the function returns, the most bytes that Python and numpy held on the way there)."""
    function(*arguments)  # imports and caches are not what is measured
    tracemalloc.start()
    try:
        return function(*arguments), tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def held(params):
    """Bytes of all parameters."""
    return sum(leaf.nbytes for leaf in flatten_dict(params, sep="/").values())
