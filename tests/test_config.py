import dataclasses
import json
import typing
from typing import Any, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxdistill import config as configs
from jaxdistill.config import ConfigError


@dataclasses.dataclass(frozen=True)
class Source:
    name: str
    weight: float = 1.0


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """Adam and relatives."""

    name: Literal["adamw", "sgd"] = "adamw"  # the update rule
    learning_rate: float = 1e-3
    """Peak of
    the schedule."""
    betas: tuple[float, float] = (0.9, 0.999)


@dataclasses.dataclass(frozen=True)
class Example:
    # Optimizer steps
    # in all.
    steps: int = 3
    shuffle: bool = True
    title: str = "é # no comment"  # shown in é reports
    widths: tuple[int, ...] = (1, 2)
    cap: float | None = None
    label: typing.Optional[str] = None  # noqa: UP045 - both spellings must work
    sizes: int | str = 3
    trainable: tuple[str, ...] = ("layers.*",)
    weights: dict[str, float] = dataclasses.field(default_factory=dict)
    sources: tuple[Source, ...] = ()
    optimizer: Optimizer = dataclasses.field(default_factory=Optimizer)
    warmup: Optimizer | None = None
    source: Source | None = None

    def __post_init__(self) -> None:
        if len(self.widths) > self.steps:
            raise ValueError(f"{len(self.widths)} widths need as many steps, not {self.steps}")


numbers = st.floats(allow_nan=False)
words = st.text()
optimizers = st.builds(
    Optimizer,
    name=st.sampled_from(["adamw", "sgd"]),
    learning_rate=numbers,
    betas=st.tuples(numbers, numbers),
)
examples = st.builds(
    Example,
    steps=st.integers(min_value=5),
    shuffle=st.booleans(),
    title=words,
    widths=st.lists(st.integers(), max_size=5).map(tuple),
    cap=st.none() | numbers,
    label=st.none() | words,
    sizes=st.integers() | words,
    trainable=st.lists(words).map(tuple),
    weights=st.dictionaries(words, numbers),
    sources=st.lists(st.builds(Source, words, numbers)).map(tuple),
    optimizer=optimizers,
    warmup=st.none() | optimizers,
    source=st.none() | st.builds(Source, words),
)


@given(examples)
@settings(max_examples=50, deadline=None)
def test_dictionary_and_back_through_json(config: Example) -> None:
    data = json.loads(json.dumps(configs.to_dict(config)))
    assert configs.from_dict(Example, data) == config
    assert configs.diff(config, data) == []


def test_to_dict_holds_plain_values() -> None:
    data = configs.to_dict(Example(warmup=Optimizer(), sources=(Source("a"),)))
    assert data["widths"] == [1, 2]
    assert data["sources"] == [{"name": "a", "weight": 1.0}]
    assert data["warmup"] == {"name": "adamw", "learning_rate": 1e-3, "betas": [0.9, 0.999]}
    assert data["source"] is None


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("steps=7", "steps", 7),
        ("steps= 7", "steps", 7),
        ("steps=1_000", "steps", 1000),
        ("shuffle=false", "shuffle", False),
        ("shuffle=True", "shuffle", True),
        ("title=", "title", ""),
        ("title=a=b", "title", "a=b"),
        ("title=none", "title", "none"),
        ("widths=3,4", "widths", (3, 4)),
        ("widths=3, 4", "widths", (3, 4)),
        ("widths=[3, 4]", "widths", (3, 4)),
        ("widths=", "widths", ()),
        ("widths=5", "widths", (5,)),
        ("cap=1e-3", "cap", 0.001),
        ("cap=3", "cap", 3.0),
        ("cap=none", "cap", None),
        ("label=none", "label", None),
        ("label=x", "label", "x"),
        ("sizes=4", "sizes", 4),
        ("sizes=large", "sizes", "large"),
        ('trainable=["a,b", "c"]', "trainable", ("a,b", "c")),
        ('weights={"wiki": 1}', "weights", {"wiki": 1.0}),
        ('sources=[{"name": "wiki"}]', "sources", (Source("wiki"),)),
        ("optimizer.name=sgd", "optimizer", Optimizer(name="sgd")),
        ("optimizer.betas=0.5,0.6", "optimizer", Optimizer(betas=(0.5, 0.6))),
        ("warmup.learning_rate=2", "warmup", Optimizer(learning_rate=2.0)),
        ('warmup={"name": "sgd"}', "warmup", Optimizer(name="sgd")),
        ("source.name=wiki", "source", Source("wiki")),
    ],
)
def test_override_is_typed(override: str, key: str, value: Any) -> None:
    changed = configs.apply_overrides(Example(), [override])
    assert changed == dataclasses.replace(Example(), **{key: value})
    assert type(getattr(changed, key)) is type(value)


def test_overrides_are_applied_together_and_the_last_wins() -> None:
    config = configs.apply_overrides(
        Example(), ["widths=1,2,3,4", "steps=9", "steps=4", "source.weight=2", "source.name=x"]
    )
    assert config == Example(steps=4, widths=(1, 2, 3, 4), source=Source("x", 2.0))
    assert configs.apply_overrides(config, ["source=none"]).source is None


def test_override_leaves_the_configuration_alone() -> None:
    config = Example(weights={"a": 1.0}, warmup=Optimizer())
    configs.apply_overrides(config, ["warmup.learning_rate=3", "optimizer.learning_rate=3"])
    assert config == Example(weights={"a": 1.0}, warmup=Optimizer())


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("steps", "an override is written key=value, not 'steps'"),
        ("stps=3", "unknown key 'stps': did you mean steps?"),
        ("learning_rate=3", "unknown key 'learning_rate': did you mean optimizer.learning_rate?"),
        ("lerning_rate=3", "unknown key 'lerning_rate': did you mean optimizer.learning_rate?"),
        ("optimizer.nam=x", "unknown key 'optimizer.nam': did you mean optimizer.name?"),
        (
            "optimizer=sgd",
            "'optimizer' is a group: set one of its keys, "
            "optimizer.name, optimizer.learning_rate, optimizer.betas",
        ),
        ("steps=x", "steps must be an integer, not 'x'"),
        ("steps=1.5", "steps must be an integer, not '1.5'"),
        ("steps=", "steps must be an integer, not ''"),
        ("shuffle=yes", "shuffle must be true or false, not 'yes'"),
        ("cap=big", "cap must be a number or none, not 'big'"),
        ("widths=1,b", "widths[1] must be an integer, not 'b'"),
        ("widths=[1, true]", "widths[1] must be an integer, not True"),
        ("widths=[1", "widths must be a list of any length (an integer), not '[1'"),
        ("weights=wiki", "weights must be a dictionary (JSON), not 'wiki'"),
        (
            "optimizer.betas=0.9",
            "optimizer.betas must be a list of 2 (a number, a number), not '0.9'",
        ),
        (
            "optimizer.name=adam",
            "optimizer.name must be one of 'adamw', 'sgd', not 'adam': did you mean adamw?",
        ),
        ("source.weight=2", "source.name is missing: it must be text"),
        (
            'sources=[{"nme": "x"}]',
            "unknown key 'sources[0].nme': did you mean sources[0].name?",
        ),
        (
            "warmup=on",
            "warmup must be a group of keys (name, learning_rate, betas) or none, not 'on'",
        ),
    ],
)
def test_wrong_override_is_one_sentence(override: str, sentence: str) -> None:
    with pytest.raises(ConfigError) as caught:
        configs.apply_overrides(Example(), [override])
    assert str(caught.value) == sentence


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        ({"steps": "3"}, "steps must be an integer, not '3'"),
        ({"steps": True}, "steps must be an integer, not True"),
        ({"steps": 3.0}, "steps must be an integer, not 3.0"),
        ({"shuffle": 1}, "shuffle must be true or false, not 1"),
        ({"title": None}, "title must be text, not None"),
        ({"cap": "1"}, "cap must be a number or none, not '1'"),
        ({"widths": 3}, "widths must be a list of any length (an integer), not 3"),
        ({"widths": [1, "2"]}, "widths[1] must be an integer, not '2'"),
        ({"weights": {"wiki": "a"}}, "weights['wiki'] must be a number, not 'a'"),
        ({"optimizer": {"rate": 1}}, "unknown key 'optimizer.rate': did you mean "),
        ({"optimizer": 3}, "optimizer must be a group of keys (name, learning_rate, betas), not 3"),
        ({"source": {}}, "source.name is missing: it must be text"),
        ({"zzz": 3}, "unknown key 'zzz': choose from steps, shuffle, "),
        ([], "a configuration must be a group of keys (steps, "),
    ],
)
def test_wrong_dictionary_is_one_sentence(data: Any, sentence: str) -> None:
    with pytest.raises(ConfigError) as caught:
        configs.from_dict(Example, data)
    assert str(caught.value).startswith(sentence)
    assert "\n" not in str(caught.value)


def test_validation_of_the_dataclass_is_heard() -> None:
    with pytest.raises(ValueError, match=r"^2 widths need as many steps, not 1$"):
        configs.apply_overrides(Example(), ["steps=1"])


def test_a_type_that_no_configuration_can_hold() -> None:
    @dataclasses.dataclass(frozen=True)
    class Wrong:
        anything: complex = 0j

    with pytest.raises(TypeError, match="a configuration cannot hold <class 'complex'>"):
        configs.apply_overrides(Wrong(), ["anything=3"])


def test_diff_names_each_changed_leaf() -> None:
    old = Example(cap=float("nan"))
    new = dataclasses.replace(
        old, steps=4, widths=(1,), label="x", optimizer=Optimizer(learning_rate=0.5)
    )
    assert configs.diff(old, old) == []
    assert configs.diff(old, new) == [
        "steps: 3 -> 4",
        "widths: [1, 2] -> [1]",
        "label: none -> 'x'",
        "optimizer.learning_rate: 0.001 -> 0.5",
    ]
    assert configs.diff({"a": 1}, {"b": {"c": None}}) == ["a: 1 -> absent", "b.c: absent -> none"]


def test_presets_by_name() -> None:
    presets = {"cpu": Example(), "v5e-64": Example(steps=9)}
    assert configs.preset(presets, "v5e-64").steps == 9
    with pytest.raises(ConfigError, match=r"^unknown preset 'v5e': did you mean v5e-64\?$"):
        configs.preset(presets, "v5e")
    with pytest.raises(ConfigError, match=r"^unknown preset 'tpu-pod': choose from cpu, v5e-64$"):
        configs.preset(presets, "tpu-pod")


def test_help_comes_from_strings_and_comments() -> None:
    helps = {option.key: option.help for option in configs.options(Example())}
    assert helps["steps"] == "Optimizer steps in all."
    assert helps["shuffle"] == ""
    assert helps["title"] == "shown in é reports"
    assert helps["optimizer.name"] == helps["warmup.name"] == "the update rule"
    assert helps["optimizer.learning_rate"] == "Peak of the schedule."


def test_options_are_all_leaves_with_their_values() -> None:
    values = {o.key: o.value for o in configs.options(Example(weights={"a": 1.0}, source=None))}
    assert values["widths"] == [1, 2]
    assert values["weights"] == {"a": 1.0}
    assert values["optimizer.learning_rate"] == 0.001
    assert values["warmup.learning_rate"] is None
    assert values["warmup"] is None
    assert "optimizer" not in values
    assert "weights.a" not in values


def test_a_class_without_source_has_no_help() -> None:
    made = dataclasses.make_dataclass("Made", [("steps", int, 3)], frozen=True)
    assert [o.help for o in configs.options(made())] == [""]
