"""Which leaves a pattern takes, that nothing is lost, and the errors."""

import pytest

from jaxdistill.train.partition import merge, partition

PARAMS = {
    "student": {
        "embed": {"embedding": 1},
        "layers": {"attention": {"query": {"kernel": 2, "bias": 3}}, "norm": {"scale": 4}},
        "head": {"kernel": 5},
    },
    "teacher": {"embed": {"embedding": 6}},
}


@pytest.mark.parametrize(
    ("patterns", "trained"),
    [
        (["student/layers/**"], {2, 3, 4}),
        (["**/kernel"], {2, 5}),
        (["student/*/kernel"], {5}),
        (["student/embed/embedding", "**/scale"], {1, 4}),
        (["**"], {1, 2, 3, 4, 5, 6}),
        (["*/embed/*"], {1, 6}),
        (["**/b*s"], {3}),
        ([], set()),
    ],
)
def test_patterns_take_these_leaves_and_merge_is_the_inverse(patterns, trained):
    trainable, frozen = partition(PARAMS, patterns)

    def leaves(tree):
        return {v for x in tree.values() for v in (leaves(x) if isinstance(x, dict) else {x})}

    assert leaves(trainable) == trained
    assert leaves(frozen) == {1, 2, 3, 4, 5, 6} - trained
    assert merge(trainable, frozen) == PARAMS
    assert merge(frozen, trainable) == PARAMS


@pytest.mark.parametrize(
    ("pattern", "nearest"),
    [
        ("student/layer/**", r"student/layers/\*\*"),
        ("student/heads/kernel", "student/head/kernel"),
        ("student/layers", r"student/layers/\*\*"),
        ("teacher.embed.embedding", "teacher/embed/embedding"),
    ],
)
def test_a_pattern_that_matches_nothing_names_the_nearest_path(pattern, nearest):
    with pytest.raises(ValueError, match=f"matches no parameter; the nearest that does.*{nearest}"):
        partition(PARAMS, ["student/head/**", pattern])


def test_a_bare_string_is_not_taken_for_a_sequence_of_letters():
    with pytest.raises(ValueError, match="must be a sequence of patterns"):
        partition(PARAMS, "**")


def test_a_leaf_in_both_trees_is_refused():
    with pytest.raises(ValueError, match="'w' is both trainable and frozen"):
        merge({"a": {"w": 1}}, {"a": {"w": 2}})
