"""The feature losses against torch, optax and the transformers library, value and gradient.

DHO, UnFuSeD and the joint-label losses have no peer to call: they are sums of divergences and
cross-entropies, which have. Neither have relations of cosines, CKA and LoRAMoE's balance.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdistill import losses

# transformers and torch warn about themselves while they are imported.
pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore")]

RNG = np.random.default_rng(0)
STUDENT, TEACHER = RNG.normal(size=(2, 6, 5)).astype(np.float32)
LOGITS = (2 * RNG.normal(size=(2, 6, 4))).astype(np.float32)


@pytest.fixture(scope="module")
def torch():
    return pytest.importorskip("torch")


@pytest.fixture(scope="module")
def optax():
    return pytest.importorskip("optax")


def ours(loss, *arrays, count: int = 1):
    """Mean of the loss, and its gradients in the first `count` arrays."""

    def mean(*arrays) -> jax.Array:
        values = loss(*arrays)
        return values.mean()

    return jax.jit(jax.value_and_grad(mean, argnums=tuple(range(count))))(*arrays)


def in_torch(torch, loss, *arrays, count: int = 1):
    tensors = [torch.tensor(x) for x in arrays]
    for tensor in tensors[:count]:
        tensor.requires_grad_()
    value = loss(*tensors)
    value.backward()
    return float(value.detach()), tuple(tensor.grad.numpy() for tensor in tensors[:count])


def assert_equal(found, expected) -> None:
    (value, gradients), (expected_value, expected_gradients) = found, expected
    assert abs(float(value)) > 1e-3
    np.testing.assert_allclose(value, expected_value, rtol=1e-5)
    for actual, gradient in zip(gradients, expected_gradients, strict=True):
        assert np.abs(np.asarray(gradient)).max() > 1e-4
        np.testing.assert_allclose(actual, gradient, rtol=1e-5, atol=1e-6)


def test_hidden_mse(torch, optax) -> None:
    found = ours(losses.hidden_mse, STUDENT, TEACHER)
    assert_equal(found, in_torch(torch, torch.nn.functional.mse_loss, STUDENT, TEACHER))
    assert_equal(found, ours(optax.squared_error, STUDENT, TEACHER))


def test_projection(torch) -> None:
    """torch's linear layer holds W as [Dt, Ds]."""
    weight, bias = RNG.normal(size=(3, 5)).astype(np.float32), STUDENT[0, :3]
    teacher = TEACHER[:, :3]

    def peer(student, weight, bias, teacher):
        projected = torch.nn.functional.linear(student, weight, bias)
        return torch.nn.functional.mse_loss(projected, teacher)

    expected = in_torch(torch, peer, STUDENT, weight, bias, teacher, count=3)
    loss = lambda student, weight, bias, teacher: losses.hidden_mse(  # noqa: E731
        student, teacher, weight.T, bias
    )
    assert_equal(ours(loss, STUDENT, weight, bias, teacher, count=3), expected)


def test_hidden_cosine(torch, optax) -> None:
    def peer(student, teacher):
        return torch.nn.functional.cosine_embedding_loss(student, teacher, torch.ones(6))

    found = ours(losses.hidden_cosine, STUDENT, TEACHER)
    assert_equal(found, in_torch(torch, peer, STUDENT, TEACHER))
    assert_equal(found, ours(optax.cosine_distance, STUDENT, TEACHER))


def test_peers_at_a_vector_of_zeros(torch, optax) -> None:
    zeros, teacher = 0 * STUDENT[:1], TEACHER[:1]

    def peer(student, teacher):
        return torch.nn.functional.cosine_embedding_loss(student, teacher, torch.ones(1))

    value, (gradient,) = ours(losses.hidden_cosine, zeros, teacher)
    assert value == 1
    assert not np.asarray(gradient).any()
    assert np.isnan(optax.cosine_distance(jnp.asarray(zeros), jnp.asarray(teacher))).all()
    gradient = in_torch(torch, peer, zeros, teacher)[1][0]
    np.testing.assert_allclose(np.linalg.norm(gradient), 1e6, rtol=1e-3)


def test_dmae_alignment(torch) -> None:
    def peer(student, teacher):
        unit = torch.nn.functional.normalize
        return torch.nn.functional.l1_loss(unit(student, dim=-1), unit(teacher, dim=-1))

    assert_equal(
        ours(losses.dmae_alignment, STUDENT, TEACHER), in_torch(torch, peer, STUDENT, TEACHER)
    )


@pytest.mark.parametrize("normalize", [False, True])
def test_masked_reconstruction(torch, normalize: bool) -> None:
    """The loss of a whole ViTMAE of the transformers library, and its gradient in the predictions.

    Its mean over removed patches is NaN if there are none.
    """
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTMAEConfig(
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        intermediate_size=8,
        decoder_hidden_size=8,
        decoder_num_hidden_layers=1,
        decoder_num_attention_heads=1,
        decoder_intermediate_size=8,
        image_size=8,
        patch_size=2,
        norm_pix_loss=normalize,
    )
    torch.manual_seed(0)
    model = transformers.ViTMAEForPreTraining(config)
    images = torch.tensor(RNG.normal(size=(2, 3, 8, 8)).astype(np.float32) * 3 + 1)
    output = model(images)
    output.logits.retain_grad()
    output.loss.backward()
    prediction, patches = output.logits.detach().numpy(), model.patchify(images).numpy()
    removed = output.mask.numpy()
    assert 0 < removed.mean() < 1

    def loss(prediction: jax.Array, patches: jax.Array, removed: jax.Array) -> jax.Array:
        values = losses.masked_reconstruction(prediction, patches, normalize_patches=normalize)
        return losses.token_mean(values, removed).mean()

    expected = float(output.loss.detach()), (output.logits.grad.numpy(),)
    assert_equal(ours(loss, prediction, patches, removed), expected)
    model.config.mask_ratio = 0.0
    assert np.isnan(float(model(images).loss.detach()))
    assert ours(loss, prediction, patches, 0 * removed)[0] == 0


def test_attention_kl(torch) -> None:
    student, teacher = (np.array(jax.nn.softmax(x[:, None, None])) for x in LOGITS)
    teacher[:, :, :, 3] = 0

    def peer(student, teacher):
        values = torch.nn.functional.kl_div(student.log(), teacher, reduction="none")
        return values.sum(-1).mean()

    loss = functools.partial(losses.attention_kl, average_heads=False)
    assert_equal(ours(loss, student, teacher), in_torch(torch, peer, student, teacher))


def test_rkd_distance(torch) -> None:
    """torch's pdist has every pair once; the authors' mean also counts the zeros of a diagonal."""

    def relative(rows):
        distances = torch.pdist(rows)
        return distances / distances.mean()

    def peer(student, teacher):
        return torch.nn.functional.smooth_l1_loss(relative(student), relative(teacher))

    expected = in_torch(torch, peer, STUDENT, TEACHER)
    assert_equal(ours(losses.rkd_distance, STUDENT, TEACHER), expected)

    def authors(student, teacher):
        square = [torch.cdist(x, x) / torch.pdist(x).mean() for x in (student, teacher)]
        return torch.nn.functional.smooth_l1_loss(*square)

    theirs = float(authors(torch.tensor(STUDENT), torch.tensor(TEACHER)))
    np.testing.assert_allclose(theirs, expected[0] * 5 / 6, rtol=1e-3)


@pytest.mark.parametrize("temperature", [0.1, 0.5])
def test_nt_xent(optax, temperature: float) -> None:
    """optax pairs rows by a label each and returns the mean over all views."""
    found = ours(
        functools.partial(losses.nt_xent, temperature=temperature), STUDENT, TEACHER, count=2
    )

    def with_labels(first: jax.Array, second: jax.Array) -> jax.Array:
        labels = jnp.concatenate([jnp.arange(6)] * 2)
        return optax.ntxent(jnp.concatenate([first, second]), labels, temperature)

    # optax adds integers to booleans and to floats.
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        assert_equal(found, ours(with_labels, STUDENT, TEACHER, count=2))


def test_barlow_twins(torch) -> None:
    """Batch normalisation standardises the views, and the target of the correlations is 1."""

    def peer(first, second):
        norm = functools.partial(
            torch.nn.functional.batch_norm, running_mean=None, running_var=None, training=True
        )
        errors = norm(first).T @ norm(second) / 6 - torch.eye(5)
        return (errors**2 * (0.1 + 0.9 * torch.eye(5))).sum()

    loss = functools.partial(losses.barlow_twins, off_diagonal_weight=0.1)
    assert_equal(
        ours(loss, STUDENT, TEACHER, count=2),
        in_torch(torch, peer, STUDENT, TEACHER, count=2),
    )


def test_output_discrimination(torch) -> None:
    scores = LOGITS[..., :2]

    def peer(student, teacher):
        targets = torch.tensor([[1.0, 0.0]] * 6 + [[0.0, 1.0]] * 6)
        return torch.nn.functional.binary_cross_entropy_with_logits(
            torch.cat([student, teacher]), targets
        )

    assert_equal(
        ours(losses.output_discrimination, *scores, count=2),
        in_torch(torch, peer, *scores, count=2),
    )
