"""docs/losses.md is what its generator makes of the docstrings now, and a table that holds."""

import re

import numpy as np
import pytest

from docs import make_losses
from jaxdistill import losses


def rows() -> list[list[str]]:
    """The cells of every line of a table."""
    lines = [x for x in make_losses.page().splitlines() if x.startswith("| [")]
    return [re.split(r"(?<!\\)\|", line)[1:-1] for line in lines]


def test_page_is_current() -> None:
    written = make_losses.PAGE.read_text(encoding="utf-8")
    assert written == make_losses.page(), "run `python -m docs.make_losses` and commit its page"


def test_every_public_loss_has_a_row_of_six_cells() -> None:
    public = {name for name in losses.__all__ if name[0].islower() and name != "from_hidden"}
    assert {re.search(r"`(\w+)`", row[0])[1] for row in rows()} == public
    assert {len(row) for row in rows()} == {6}
    assert all(cell.strip() for row in rows() for cell in row)


def test_a_loss_without_facts_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    sft = make_losses.FAMILIES["Supervised fine-tuning"]
    monkeypatch.delitem(sft, "dft")
    monkeypatch.setitem(sft, "dtf", make_losses.Facts("`token_mean`"))
    with pytest.raises(ValueError, match=r"it lacks \['dft'\] and has \['dtf'\] besides"):
        make_losses.page()


def test_a_loss_stands_in_one_family(monkeypatch: pytest.MonkeyPatch) -> None:
    facts = make_losses.Facts("`token_mean`")
    monkeypatch.setitem(make_losses.FAMILIES["Diffusion"], "dft", facts)
    with pytest.raises(ValueError, match=r"twice \['dft'\]"):
        make_losses.page()


def test_every_hidden_state_form_is_marked() -> None:
    marked = {re.search(r"`(\w+)`", row[0])[1] for row in rows() if "**H**" in row[0]}
    assert marked == set(losses.from_hidden.__all__)


def test_formulas_are_whole() -> None:
    """Blocks that follow each other are one formula; a usage further down is none."""
    surrogate = make_losses.formula(losses.policy_surrogate)
    assert 'ratio "token"' in surrogate[0]
    assert 'clip "cispo"' in surrogate[-1]
    assert len(make_losses.formula(losses.mask_thought)) == 2


def test_shapes_come_from_where_the_docstring_says() -> None:
    expected = ["log_prob [..., T]", "old_log_prob [..., T]", "advantage [...]", "mask [..., T]"]
    assert make_losses.inputs(losses.grpo) == expected
    assert make_losses.inputs(losses.mask_thought)[-1] == "key"


def test_differences_are_sentences_that_name_a_peer() -> None:
    told = make_losses.differences(losses.cpo)
    assert told.startswith("TRL averages the likelihood over the tokens of a microbatch")
    assert "The margin is on sums" not in told
    assert make_losses.differences(losses.linear_ramp) == ""


def test_peers_are_those_we_know() -> None:
    facts = [x for family in make_losses.FAMILIES.values() for x in family.values()]
    names = {name for x in facts for name in re.sub(r" \(.*?\)", "", x.peers).split(", ")}
    assert names <= {*make_losses.PEERS, make_losses.NONE}


def test_links_lead_somewhere() -> None:
    links = set(re.findall(r"\]\((?!https:)([^)]+)\)", make_losses.page()))
    assert links
    assert all((make_losses.PAGE.parent / link).is_file() for link in links)


def test_snippet_runs() -> None:
    (snippet,) = re.findall(r"```python\n(.*?)```", make_losses.page(), flags=re.DOTALL)
    names = {
        "tokens": np.array([[3, 1, 2, 0], [2, 2, 1, 3]]),
        "loss_mask": np.array([[0, 1, 1, 1], [0, 0, 1, 1]]),
        "segment_ids": np.ones((2, 4), int),
        "logits": np.random.default_rng(0).normal(size=(2, 4, 4)).astype(np.float32),
        "weights": np.full((2, 4), 2.0),
    }
    exec(snippet, names)
    np.testing.assert_allclose(names["weighted"], names["loss"], rtol=1e-6)
