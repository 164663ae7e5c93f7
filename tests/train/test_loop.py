"""The loop in one process: signals, refusals, divergence, meshes, and the real pipeline."""

import dataclasses
import re
import signal
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdistill.data.packing import Example
from jaxdistill.data.pipeline import Pipeline
from jaxdistill.losses import Weighted
from jaxdistill.parallel.mesh import make_mesh, sharding
from jaxdistill.train.checkpoint import FingerprintMismatch
from jaxdistill.train.loop import Preempted, TrainConfig, TrainingDiverged, fit
from jaxdistill.train.metrics import read_metrics
from jaxdistill.workdir import Workdir
from tests.train import tiny_run
from tests.train.tiny_run import CONFIG, CounterBatches


def short(steps, **changes):
    return dataclasses.replace(CONFIG, steps=steps, **changes)


def test_a_finished_run_is_returned_without_training(tmp_path):
    first = tiny_run.run(Workdir(tmp_path), config=short(3))

    def never(*_):
        raise AssertionError("a finished run must not train")

    again = tiny_run.run(
        Workdir(tmp_path), CounterBatches(on_batch=never), short(3), loss_fn=never, evaluate=never
    )
    assert tiny_run.hashes(again) == tiny_run.hashes(first)


def test_one_trace_a_run(tmp_path):
    traces = []

    def loss_fn(*arguments):
        traces.append(1)
        return tiny_run.loss_fn(*arguments)

    tiny_run.run(Workdir(tmp_path), config=short(6), loss_fn=loss_fn)
    assert len(traces) == 1


def test_it_trains_without_a_workdir_and_evaluates_the_merged_parameters():
    seen = []

    def evaluate(params, step):
        seen.append((sorted(params), step))
        return {}

    state = tiny_run.run(None, config=short(6), evaluate=evaluate)
    names = ["down", "scale", "up"]
    assert seen == [(names, 5), (names, 6)]
    assert int(state.step) == 6


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    path = tmp_path_factory.mktemp("begun")
    tiny_run.run(Workdir(path), config=short(3))
    return Workdir(path)


@pytest.mark.parametrize(
    ("changes", "shown"),
    [
        ({"batches": CounterBatches(seed=1)}, r"data\.seed: 0 -> 1"),
        ({"batches": CounterBatches(batch_size=8)}, r"data\.batch_size: 4 -> 8"),
        ({"batches": CounterBatches(source="other")}, r"data\.source: 'counter' -> 'other'"),
        ({"frozen": {"scale": np.float32(0.25)}}, r"frozen\.checksum: '?\w+'? -> '?\w+'?"),
        ({"config": short(4, seed=4)}, r"training\.seed: 3 -> 4"),
        ({"config": short(4, accumulation=1)}, r"training\.accumulation: 2 -> 1"),
    ],
)
def test_another_run_is_refused_with_both_values_and_nothing_is_lost(begun, changes, shown):
    before = begun.metrics_file.read_text()
    with pytest.raises(FingerprintMismatch, match=shown):
        tiny_run.run(begun, **{"config": short(4)} | changes)
    assert begun.metrics_file.read_text() == before


def bad_batches(bad):
    class Batches(CounterBatches):
        def __next__(self):
            batch = super().__next__()
            if self.number in bad:
                batch["x"][:] = np.nan
            return batch

    return Batches()


def test_a_bad_batch_is_skipped_counted_and_written_down(tmp_path):
    state = tiny_run.run(Workdir(tmp_path), bad_batches({2, 4}), short(5, max_skipped=2))
    assert int(state.skipped) == 2
    rows = read_metrics(Workdir(tmp_path).metrics_file)
    skipped = [row["skipped"] for row in rows if "skipped" in row]
    assert skipped == [0, 1, 1, 2, 2]
    assert np.isnan([row["loss"] for row in rows if "loss" in row]).tolist() == [
        False, True, False, True, False,
    ]  # fmt: skip
    assert all(np.isfinite(np.asarray(x)).all() for x in jax.tree.leaves(state.params))


def test_too_many_bad_batches_in_a_row_end_the_run(tmp_path):
    config = short(9, max_skipped=3, checkpoint_every=2)
    message = r"3 steps in a row were not finite .* first loss = nan at step 4; lower"
    with pytest.raises(TrainingDiverged, match=message):
        tiny_run.run(Workdir(tmp_path), bad_batches({2, 4, 5, 6, 7}), config)
    # The folder still holds good parameters: the same run, with the data mended, goes on.
    state = tiny_run.run(Workdir(tmp_path), bad_batches({2}), config)
    assert int(state.step) == 9
    assert all(np.isfinite(np.asarray(x)).all() for x in jax.tree.leaves(state.params))


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_the_step_and_raises_preempted(tmp_path, number, code):
    before = signal.getsignal(number)
    send = lambda n: signal.raise_signal(number) if n == 3 else None  # noqa: E731
    with pytest.raises(Preempted, match="tiny was stopped after step 3; it is saved") as caught:
        tiny_run.run(Workdir(tmp_path), CounterBatches(on_batch=send))
    assert caught.value.code == code
    assert signal.getsignal(number) is before
    assert (tmp_path / "checkpoints/tiny/3").is_dir()


def test_a_signal_during_the_last_evaluation_is_not_forgotten(tmp_path):
    def evaluate(params, step):
        signal.raise_signal(signal.SIGTERM)
        return {}

    config = short(3, evaluate_every=None)
    with pytest.raises(Preempted, match="after step 3; it is saved"):
        tiny_run.run(Workdir(tmp_path), config=config, evaluate=evaluate)
    assert int(tiny_run.run(Workdir(tmp_path), config=config).step) == 3


def test_a_second_signal_goes_to_whoever_had_it_before():
    received = []
    before = signal.signal(signal.SIGTERM, lambda *_: received.append("mine"))

    def send_twice(number):
        if number == 2:
            signal.raise_signal(signal.SIGTERM)
            assert received == []
            signal.raise_signal(signal.SIGTERM)

    try:
        with pytest.raises(Preempted, match="after step 2; nothing is saved without a workdir"):
            tiny_run.run(None, CounterBatches(on_batch=send_twice))
    finally:
        signal.signal(signal.SIGTERM, before)
    assert received == ["mine"]


def test_no_handler_is_touched_outside_the_main_thread():
    before = signal.getsignal(signal.SIGTERM)
    seen = []
    look = lambda number: seen.append(signal.getsignal(signal.SIGTERM))  # noqa: E731
    batches = CounterBatches(on_batch=look)
    thread = threading.Thread(target=tiny_run.run, args=(None, batches, short(3)))
    thread.start()
    thread.join()
    assert seen == [before] * 3


def test_data_that_ends_is_an_error_that_says_where():
    class Two(CounterBatches):
        def __next__(self):
            if self.number == 2:
                raise StopIteration
            return super().__next__()

    with pytest.raises(ValueError, match=r"the data ended before step 3 of 16; repeat it"):
        tiny_run.run(None, Two())


def test_the_wait_for_data_and_the_speed_are_measured(tmp_path):
    tokens = {"tokens": np.ones((2, 8), np.int32), "segment_ids": np.eye(2, 8, dtype=np.int32)}

    class Slow(CounterBatches):
        def __next__(self):
            time.sleep(0.05)
            return super().__next__() | tokens

    tiny_run.run(Workdir(tmp_path), Slow(), short(4, accumulation=1, evaluate_every=None))
    rows = [row for row in read_metrics(Workdir(tmp_path).metrics_file) if "loss" in row]
    assert all(row["input_wait_seconds"] >= 0.05 for row in rows)
    assert all(0 < row["tokens_per_second"] <= 2 / 0.05 for row in rows[:-1])
    assert "tokens_per_second" not in rows[-1]


def test_the_bar_tells_steps_loss_speed_and_the_time_left(capsys):
    batch = {"tokens": np.ones((4, 8), np.int32)}

    class Tokens(CounterBatches):
        def __next__(self):
            return super().__next__() | batch

    state = tiny_run.run(None, Tokens(), short(3, evaluate_every=None), show_progress=True)
    assert int(state.step) == 3
    told = r"tiny .* 3/3 loss \d+\.\d{4} [\d,]+ tokens/s \d:\d\d:\d\d left \d:\d\d:\d\d"
    assert re.search(told, capsys.readouterr().out)


def test_sharded_parameters_and_batches_train_to_the_same_place(tmp_path):
    mesh = make_mesh(fsdp=4, tensor=2)
    axes = {"up": ("width", "mlp"), "down": ("mlp",)}
    params = tiny_run.initial_params()
    shardings = {name: sharding(axes[name], x.shape, mesh) for name, x in params.items()}
    options = {"frozen": tiny_run.FROZEN, "run": "tiny", "show_progress": False}

    def train(steps, **more):
        return fit(
            tiny_run.loss_fn,
            tiny_run.optimizer(),
            jax.device_put(params, shardings),
            CounterBatches(batch_size=8),
            short(steps, accumulation=1, evaluate_every=None),
            batch_sharding=sharding(("batch",), (8,), mesh),
            **options | more,
        )

    train(3, workdir=Workdir(tmp_path))
    sharded = train(6, workdir=Workdir(tmp_path))  # restores onto the mesh
    assert jax.tree.map(lambda x: x.sharding, sharded.params) == shardings
    single = fit(
        tiny_run.loss_fn,
        tiny_run.optimizer(),
        params,
        CounterBatches(batch_size=8),
        short(6, accumulation=1, evaluate_every=None),
        **options,
    )
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)  # noqa: E731
    jax.tree.map(close, jax.device_get(sharded.params), jax.device_get(single.params))


def test_the_real_pipeline_goes_on_where_it_was(tmp_path):
    examples = [Example(np.arange(i, i + 4), np.ones(4, np.float32)) for i in range(1, 21)]
    config = TrainConfig(steps=7, checkpoint_every=2)

    def loss_fn(params, batch, key):
        logits = params["w"][batch["tokens"]]
        loss = Weighted(jnp.sum(batch["loss_mask"] * logits**2), jnp.sum(batch["loss_mask"]))
        first = batch["tokens"][0].astype(jnp.float32)
        return loss, {"tokens": Weighted(jnp.sum(first * jnp.arange(1.0, 5)), jnp.float32(1))}

    def train(path, config=config, seed=0):
        pipeline = Pipeline(examples, length=4, batch_size=3, seed=seed, vocab_size=30)
        params = {"w": jnp.linspace(-1, 1, 30)}
        options = {"workdir": Workdir(path), "show_progress": False}
        state = fit(loss_fn, tiny_run.optimizer(), params, pipeline, config, **options)
        pipeline.close()
        rows = read_metrics(Workdir(path).metrics_file)
        return tiny_run.hashes(state), [(row["tokens"], row["loss"]) for row in rows]

    train(tmp_path / "b", dataclasses.replace(config, steps=3))
    with pytest.raises(FingerprintMismatch, match=r"data\.seed: 0 -> 1"):
        train(tmp_path / "b", seed=1)
    assert train(tmp_path / "b") == train(tmp_path / "a")


@pytest.mark.parametrize("name", ["steps", "accumulation", "checkpoint_every", "evaluate_every"])
def test_settings_below_one_are_refused(name):
    with pytest.raises(ValueError, match=f"{name} must be at least 1"):
        TrainConfig(**{"steps": 3, name: 0})
