"""The quickstart on a teacher of some thousand parameters and generated text, as a process to kill.

Usage: python -m tests.experiments.tiny_quickstart WORKDIR
"""

import pathlib
import sys
import tempfile

import jax
import numpy as np
import rich.console

from experiments import quickstart
from jaxdistill import config as configs
from jaxdistill import launch, workdir
from jaxdistill.data import sources, tokenizers
from jaxdistill.models import decoder
from jaxdistill.train.optimizer import OptimizerConfig

LETTERS = " abcdefghijklmnopqrstuvwxyz.?"
CONTROL = ("<unk>", "<s>", "</s>")
TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
CONFIG = quickstart.Config(
    dropped_layers=2,
    calibration_documents=3,
    held_out_documents=4,
    length=32,
    batch_size=2,
    steps=6,
    optimizer=OptimizerConfig(learning_rate=3e-3),
    checkpoint_every=2,
    evaluate_every=3,
    prompt="what is [/this]?",  # what a console must not take for markup
    new_tokens=4,
)


def teacher() -> tuple[quickstart.Model, tokenizers.Tokenizer]:
    tokenizer = tokenizers.scored_bpe(
        [*CONTROL, *LETTERS],
        scores=[0.0] * (len(CONTROL) + len(LETTERS)),
        control=CONTROL,
        bos_id=1,
        eos_id=2,
        space_prefix=False,
        chat_template=TEMPLATE,
    )
    config = decoder.DecoderConfig(
        vocab_size=tokenizer.vocab_size,
        width=16,
        num_layers=5,
        num_heads=2,
        num_kv_heads=1,
        head_dim=8,
        mlp_width=32,
        max_length=64,
        tie_embeddings=True,
    )
    return quickstart.Model(decoder.init(config, jax.random.key(0)), config), tokenizer


def write_text(path: pathlib.Path, documents: int, seed: int) -> pathlib.Path:
    rng = np.random.default_rng(seed)
    letters = np.array(list(LETTERS))
    lines = ["".join(rng.choice(letters, rng.integers(8, 40))).strip() for _ in range(documents)]
    path.write_text("\n".join(lines))
    return path


def texts(folder: pathlib.Path) -> dict[str, pathlib.Path]:
    """Both named sources, written into a folder."""
    return {
        CONFIG.text: write_text(folder / "train", 30, seed=0),
        CONFIG.held_out_text: write_text(folder / "held_out", 8, seed=1),
    }


def run(path: str, folder: pathlib.Path) -> dict:
    """The quickstart in the workdir `path`, with everything that is fetched put in its place."""
    quickstart.load_teacher = lambda config: teacher()
    sources.resolve = texts(folder).__getitem__
    with workdir.open(
        path, experiment="tiny_quickstart", preset="tiny", config=configs.to_dict(CONFIG)
    ) as opened:
        context = launch.Context(opened, rich.console.Console(stderr=True), "tiny")
        return quickstart.run(CONFIG, context)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        run(sys.argv[1], pathlib.Path(folder))
