"""Bad arguments of the heads stop before anything is compiled, in one sentence."""

import logging
import re

import numpy as np
import pytest
from jaxdistill.kernels import (
    ImplementationError,
    dispatch,
    linear_cross_entropy,
    linear_divergence,
)

HIDDEN = np.ones((2, 3, 4), np.float32)
HEAD = np.ones((8, 4), np.float32)
LABELS = np.zeros((2, 3), int)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden": HIDDEN.astype(int)}, "hidden must be floating with shape [..., D], but it is"),
        ({"head": HEAD[0]}, "head must be floating with two dimensions, but it is float32 with"),
        ({"head": HEAD.T}, "must have width 4 as hidden has, but its shape is (4, 8)"),
        ({"head_layout": "dv"}, "head of layout 'dv' must have width 4"),
        ({"head_layout": "hv"}, 'head_layout must be "vd" or "dv", but it is \'hv\''),
        ({"labels": LABELS[0]}, "labels must have shape (2, 3), but the shape is (3,)"),
        ({"labels": LABELS - 100}, "labels must lie in [0, 8), but -100 is among them: give a"),
        ({"labels": LABELS + 5, "vocab_size": 5}, "labels must lie in [0, 5), but 5 is among"),
        ({"labels": LABELS * 1.0}, "labels must be integers, but the type is float"),
        ({"vocab_size": 9}, "vocab_size must lie in [1, 8], the columns of head, but it is 9"),
        ({"temperature": 0.0}, "temperature must be finite and above 0, but it is 0.0"),
        ({"temperature": np.ones(2)}, "temperature must be a scalar, but its shape is (2,)"),
        ({"soft_cap": -1.0}, "soft_cap must be finite and above 0, but it is -1.0"),
        ({"chunk_tokens": 0}, "chunk_tokens must be a whole number above 0 or None, but it is 0"),
        ({"chunk_vocab": 2.5}, "chunk_vocab must be a whole number above 0 or None, but it is 2.5"),
    ],
)
def test_cross_entropy_says_what_is_wrong(change: dict, message: str) -> None:
    arguments = {"hidden": HIDDEN, "head": HEAD, "labels": LABELS} | change
    arrays = [arguments.pop(name) for name in ("hidden", "head", "labels")]
    with pytest.raises(ValueError, match=re.escape(message)):
        linear_cross_entropy(*arrays, **arguments)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "kl"}, "kind must be one of 'forward_kl', 'reverse_kl', 'symmetric_kl', "),
        ({"kind": "jensen_shannon"}, "share must be a scalar for kind 'jensen_shannon', but it is"),
        (
            {"kind": "jensen_shannon", "share": 0.0},
            "share must lie in (0, 1) for kind 'jensen_shannon', but it is 0.0",
        ),
        (
            {"kind": "skew_reverse_kl", "share": 1.0},
            "share must lie in [0, 1) for kind 'skew_reverse_kl', but it is 1.0",
        ),
        ({"share": 0.5}, "share must be None for kind 'forward_kl', but it is 0.5"),
        ({"teacher_head": HEAD[:7]}, "one vocabulary, but they have 8 and 7 columns: if they"),
        ({"teacher_head": HEAD[:, :3]}, "must have width 4 as teacher_hidden has, but its shape"),
        ({"teacher_hidden": HIDDEN[:1]}, "teacher_hidden must have leading shape (2, 3) as"),
        ({"temperature": -2.0}, "temperature must be finite and above 0, but it is -2.0"),
        ({"teacher_soft_cap": 0.0}, "teacher_soft_cap must be finite and above 0, but it is 0.0"),
    ],
)
def test_divergence_says_what_is_wrong(change: dict, message: str) -> None:
    names = ("student_hidden", "student_head", "teacher_hidden", "teacher_head")
    arguments = dict(zip(names, (HIDDEN, HEAD, HIDDEN, HEAD), strict=True)) | change
    arrays = [arguments.pop(name) for name in names]
    with pytest.raises(ValueError, match=re.escape(message)):
        linear_divergence(*arrays, **arguments)


def test_a_named_implementation_serves_or_raises() -> None:
    with pytest.raises(
        ImplementationError,
        match="softmax has no implementation 'pallas': choose one of 'auto', 'xla', 'reference'",
    ):
        dispatch.choose("softmax", "pallas", {"xla": min, "reference": max})
    with pytest.raises(ImplementationError, match="'auto', 'xla', 'pallas', 'reference'"):
        linear_cross_entropy(HIDDEN, HEAD, LABELS, implementation="cuda")
    with pytest.raises(ImplementationError, match="knows no implementation 'triton'"):
        linear_divergence(HIDDEN, HEAD, HIDDEN, HEAD, implementation="triton")


def test_auto_says_once_what_it_chose(caplog: pytest.LogCaptureFixture) -> None:
    dispatch._say_once.cache_clear()
    with caplog.at_level(logging.INFO, logger="jaxdistill.kernels"):
        for _ in range(2):
            linear_cross_entropy(HIDDEN, HEAD, LABELS)
    assert [record.getMessage() for record in caplog.records] == [
        "linear_cross_entropy: implementation='auto' chose 'xla'"
    ]
