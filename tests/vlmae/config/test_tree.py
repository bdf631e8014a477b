"""Configs as trees: what is flattened, written and overridden comes back the same."""

import dataclasses
import json

import hypothesis
import pytest
from helpers import SMALL
from hypothesis import strategies as st

from vlmae.config.tree import differing, flatten, from_dict, override

PLAIN = flatten(SMALL)
# Fields of each type, with values that no check refuses.
VALUES = {
    "seed": st.integers(0, 2**31 - 1),
    "name": st.text("abcxyz_0", min_size=1, max_size=8),
    "optim.learning_rate": st.floats(1e-6, 1.0),
    "optim.schedule": st.sampled_from(["cosine", "linear"]),
    "optim.warmup_steps": st.integers(0, 50),
    "objectives.vtm": st.floats(0.0, 9.0),
    "model.video.mask.ratio": st.floats(0.1, 0.99),
    "model.text.dropout": st.floats(0.0, 0.9),
    "data.flip": st.booleans(),
    "data.train.0.num_frames": st.integers(1, 64),
    "data.train.0.split": st.sampled_from(["train", "train[:50%]"]),
}


@hypothesis.given(st.fixed_dictionaries({}, optional=VALUES))
def test_an_override_changes_its_fields_and_no_other(changes):
    changed = override(SMALL, changes)
    assert flatten(changed) == PLAIN | changes
    assert differing(SMALL, changed) == sorted(k for k, v in changes.items() if PLAIN[k] != v)
    assert override(changed, {name: PLAIN[name] for name in changes}) == SMALL


@hypothesis.given(st.fixed_dictionaries({}, optional=VALUES))
def test_a_config_comes_back_from_json(changes):
    changed = override(SMALL, changes)
    text = json.dumps(dataclasses.asdict(changed))
    assert from_dict(type(SMALL), json.loads(text)) == changed


@pytest.mark.parametrize(
    "name",
    ["data.train.1.num_frames", "data.train.x", "data.train.-1.split", "optim", "model.vide"],
)
def test_a_name_that_is_no_field_is_an_error(name):
    with pytest.raises(ValueError, match=r"unknown field|must be"):
        override(SMALL, {name: 1})
