"""Tiny decoders for tests: with nothing switched on, and with everything."""

import dataclasses
import functools

import jax
import numpy as np

from jaxdistill.models import DecoderConfig, RopeScaling, decoder

# Most of these tests' time is XLA's: with tiny arrays, compiling without optimisation is 4 times
# faster. The golden tests (stories260K, the sampler's) run what users run.
quick_jit = functools.partial(
    jax.jit,
    compiler_options={
        "xla_backend_optimization_level": 0,
        "xla_llvm_disable_expensive_passes": True,
    }
    # Newer compilers do without this one, and refuse a name they do not know.
    | ({"xla_cpu_use_fusion_emitters": False} if jax.__version_info__ < (0, 11) else {}),
)
PLAIN = DecoderConfig(
    vocab_size=29,
    width=24,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    mlp_width=20,
    max_length=64,
)
FULL = dataclasses.replace(
    PLAIN,
    rope_theta=500.0,
    rope_scaling=RopeScaling("llama3", 4.0, original_max_length=16),
    padded_vocab_size=32,
    query_key_norm=True,
    attention_bias=True,
    attention_output_bias=True,
    mlp_bias=True,
    attention_soft_cap=2.0,
    logit_soft_cap=3.0,
    sliding_window=5,
)


apply = quick_jit(decoder.apply, static_argnames=("config", "taps"))


def random_params(config, seed=0):
    """Every leaf random, norms and biases too, large enough for the soft caps to bite."""
    rng = np.random.default_rng(seed)

    def leaf(path, shape):
        noise = rng.normal(size=shape.shape)
        name = path[-1].key
        values = {"scale": 1 + 0.3 * noise, "bias": 0.3 * noise, "kernel": 0.4 * noise}
        return values.get(name, noise).astype(np.float32)

    return jax.tree_util.tree_map_with_path(leaf, decoder.abstract_params(config))


def random_tokens(config, batch, length, seed=1):
    shape = (batch, length)
    return np.random.default_rng(seed).integers(0, config.vocab_size, shape).astype(np.int32)
