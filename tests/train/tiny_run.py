"""A tiny training run, in this process or in one that dies on demand.

    python -m tests.train.tiny_run WORKDIR [DEATH]

DEATH is `SIGKILL@7` or `SIGTERM@7` (when batch 7 is asked for), `mkdir@state` or `rename@12` (kill
-9 just before a file or folder whose name begins so is made, inside the save of a checkpoint).
"""

import hashlib
import json
import os
import signal
import sys

import jax
import jax.numpy as jnp
import numpy as np

from jaxdistill.losses import Weighted
from jaxdistill.train.loop import TrainConfig, fit
from jaxdistill.train.optimizer import OptimizerConfig, make_optimizer
from jaxdistill.workdir import Workdir

CONFIG = TrainConfig(
    steps=16, seed=3, accumulation=2, evaluate_every=5, checkpoint_every=4, max_grad_norm=1.0
)
FROZEN = {"scale": np.float32(0.5)}


class CounterBatches:
    """Batch number n is a function of (seed, n) alone; the state is the next n."""

    def __init__(self, seed=0, batch_size=4, source="counter", on_batch=lambda number: None):
        self.fingerprint = {"source": source, "seed": seed, "batch_size": batch_size}
        self.number = 0
        self.on_batch = on_batch

    def __next__(self):
        self.number += 1
        self.on_batch(self.number)
        rng = np.random.default_rng([self.fingerprint["seed"], self.number])
        rows = self.fingerprint["batch_size"]
        mask = rng.integers(0, 2, (rows, 3)).astype(np.float32)
        return {
            "x": rng.normal(size=(rows, 3, 8)).astype(np.float32),
            "mask": mask,
            "number": np.full(rows, self.number, np.float32),
        }

    def get_state(self):
        return {"number": self.number}

    def set_state(self, state):
        self.number = state["number"]


def loss_fn(params, batch, key):
    """A masked loss with noise; the metric `batch` tells which batch it was."""
    noise = jax.random.normal(key, batch["mask"].shape)
    hidden = jnp.tanh(batch["x"] @ params["up"])
    error = (hidden @ params["down"] * params["scale"] - 1 + 0.1 * noise) * batch["mask"]
    number = batch["number"]
    return Weighted(jnp.sum(error**2), jnp.sum(batch["mask"])), {
        "batch": Weighted(jnp.sum(number), jnp.float32(number.size))
    }


def initial_params():
    rng = np.random.default_rng(1)
    return {
        "up": jnp.asarray(rng.normal(size=(8, 16)), jnp.float32),
        "down": jnp.asarray(rng.normal(size=(16,)), jnp.float32),
    }


def evaluate(params, step):
    return {"up_norm": float(jnp.linalg.norm(params["up"])), "evaluated_at": step}


def optimizer():
    return make_optimizer(OptimizerConfig(weight_decay=0.1, warmup_steps=2), CONFIG.steps)


def run(workdir, batches=None, config=CONFIG, **options):
    """`fit` on all of the above."""
    options = {"frozen": FROZEN, "evaluate": evaluate, "show_progress": False} | options
    batches = CounterBatches() if batches is None else batches
    return fit(
        options.pop("loss_fn", loss_fn),
        optimizer(),
        initial_params(),
        batches,
        config,
        workdir=workdir,
        run="tiny",
        **options,
    )


def hashes(state):
    """Path -> SHA-256 of each array's bytes."""
    leaves = jax.tree_util.tree_flatten_with_path(state._asdict())[0]
    return {
        jax.tree_util.keystr(path): hashlib.sha256(np.asarray(leaf).tobytes()).hexdigest()
        for path, leaf in leaves
    }


def die_at_batch(name, wanted):
    def on_batch(number):
        if number == wanted:
            os.kill(os.getpid(), getattr(signal, name))

    return on_batch


def die_at_file_operation(name, beginning):
    """Kills before `os.mkdir` or `os.rename` makes a path whose last name begins so."""

    def hook(event, arguments):
        if event == f"os.{name}":
            path = os.path.basename(str(arguments[0 if name == "mkdir" else 1]))
            if path.startswith(beginning):
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def main(path, death=None):
    on_batch = lambda number: None  # noqa: E731
    if death is not None:
        how, _, where = death.partition("@")
        if how.startswith("SIG"):
            on_batch = die_at_batch(how, int(where))
        else:
            die_at_file_operation(how, where)
    state = run(Workdir(path), CounterBatches(on_batch=on_batch))
    Workdir(path).path.joinpath("final.json").write_text(json.dumps(hashes(state)))


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_numpy_dtype_promotion", "strict")
    main(*sys.argv[1:])
