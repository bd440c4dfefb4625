"""The losses against plain formulas, and blocks of them against the whole."""

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten

from mlx_ifp.llm.build import build_model
from mlx_ifp.llm.output import output_layer
from mlx_ifp.tuner.losses import (
    Targets,
    blockwise_loss,
    contrastive_loss,
    cross_entropy,
    kl_to_teacher,
)

from ..conftest import ARCHITECTURES
from ..helpers import memory_peak, relative_error

N, V = 10, 384


@pytest.fixture
def teacher():
    mx.random.seed(3)
    return mx.random.normal((N, V)) * 3


def _full_kl(teacher: mx.array, student: mx.array) -> mx.array:
    p = mx.softmax(teacher, axis=-1)
    difference = teacher - mx.logsumexp(teacher, -1, keepdims=True) - student
    return (p * (difference + mx.logsumexp(student, -1, keepdims=True))).sum(-1)


def _top(teacher: mx.array, k: int) -> tuple[mx.array, mx.array]:
    logprobs = teacher - mx.logsumexp(teacher, -1, keepdims=True)
    ids = mx.argsort(-logprobs, axis=-1)[:, :k]
    return ids, mx.take_along_axis(logprobs, ids, axis=-1)


def _kl(teacher: mx.array, student: mx.array, k: int) -> mx.array:
    return kl_to_teacher(student, mx.logsumexp(student, -1), *_top(teacher, k))


def test_kl_with_all_tokens_is_the_divergence(teacher):
    student = mx.random.normal((N, V))
    assert relative_error(_kl(teacher, student, V), _full_kl(teacher, student)) < 1e-4


def test_kl_with_few_tokens_is_a_lower_bound_and_grows(teacher):
    student = mx.random.normal((N, V))
    values = [_kl(teacher, student, k).sum().item() for k in (2, 16, 128)]
    assert 0 < values[0] < values[1] < values[2] <= _full_kl(teacher, student).sum().item()


def test_kl_to_itself_is_zero(teacher):
    assert mx.abs(_kl(teacher, teacher, 16)).max().item() < 1e-5


def test_cross_entropy_is_minus_the_log_probability(teacher):
    labels = mx.arange(N)
    expected = -mx.log(mx.softmax(teacher, axis=-1))[mx.arange(N), labels]
    loss = cross_entropy(teacher, mx.logsumexp(teacher, -1), labels)
    assert relative_error(loss, expected) < 1e-5


@pytest.mark.parametrize("name", ["llama", "phi3", "gemma2", "granite"])
@pytest.mark.parametrize("frozen", [False, True])
def test_blocks_give_the_whole_loss_and_its_gradients(name, frozen, teacher):
    model = build_model({"model_type": name, **ARCHITECTURES[name]})
    if frozen:
        model.freeze()
    hidden = mx.random.normal((N, 64))
    ids, logprobs = _top(teacher, 16)
    weights = mx.arange(N) / N
    targets = Targets(mx.arange(N), weights, ids, logprobs, 1 - weights)

    def loss(parameters, hidden, block):
        model.update(parameters)
        trained, logits = output_layer(model)
        # Scaled, because a cotangent other than 1 must pass through.
        return 3 * blockwise_loss(trained, hidden, targets, logits, block)[0]

    def plain(parameters, hidden):
        model.update(parameters)
        trained, logits = output_layer(model)
        values = logits(trained, hidden)
        lse = mx.logsumexp(values, -1)
        ce = weights * cross_entropy(values, lse, targets.labels)
        kl = (1 - weights) * kl_to_teacher(values, lse, ids, logprobs)
        return 3 * (ce + kl).sum()

    parameters = model.trainable_parameters()
    wanted, expected = mx.value_and_grad(plain, argnums=(0, 1))(parameters, hidden)
    for block in (3, N, 512):
        value, gradients = mx.value_and_grad(loss, argnums=(0, 1))(parameters, hidden, block)
        assert relative_error(value, wanted) < 1e-5
        found = dict(tree_flatten(gradients))
        for key, gradient in tree_flatten(expected):
            if isinstance(gradient, mx.array):
                assert mx.allclose(found[key], gradient, rtol=1e-4, atol=1e-6), key


@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
def test_memory_is_that_of_one_block(trained):
    model = build_model({"model_type": "llama", **ARCHITECTURES["llama"], "vocab_size": 20000})
    if not trained:
        model.freeze()
    parameters, logits = output_layer(model)
    mx.eval(model.parameters())

    def peak_of(n: int, block: int) -> int:
        hidden = mx.random.normal((n, 64))
        targets = Targets(mx.arange(n), mx.ones((n,)))
        mx.eval(hidden, targets.labels, targets.ce_weights)

        def loss(parameters, hidden):
            return blockwise_loss(parameters, hidden, targets, logits, block)

        wanted = (0, 1) if trained else 1
        with memory_peak() as peak:
            mx.eval(mx.value_and_grad(loss, argnums=wanted)(parameters, hidden))
        return peak.nbytes

    assert peak_of(512, 64) < peak_of(512, 512) / 2
    assert peak_of(1024, 64) < 1.3 * peak_of(128, 64)


def test_contrastive_loss_prefers_tasks_apart():
    mx.random.seed(0)
    centres = mx.random.normal((2, 3, 20))
    noise = 0.1 * mx.random.normal((6, 3, 20))
    tasks = ["a", "a", "a", "b", "b", "b"]
    apart = centres[mx.array([0, 0, 0, 1, 1, 1])] + noise
    mixed = centres[mx.array([0, 1, 0, 1, 0, 1])] + noise
    assert contrastive_loss(apart, tasks).item() < contrastive_loss(mixed, tasks).item() / 2


def test_contrastive_loss_of_prompts_without_companions_is_zero():
    scores = mx.random.normal((3, 2, 10))
    assert contrastive_loss(scores, ["a", "b", "c"]).item() == 0
    gradient = mx.grad(lambda s: contrastive_loss(s, ["a", "a", "b"]))(scores)
    assert mx.isfinite(gradient).all()
