"""What was sealed comes back; anything else is noticed."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hasten.sealed import DamagedError, parse_json, seal, unseal

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
CONTENT = st.dictionaries(st.text().filter(lambda name: name != "sha256"), VALUES, max_size=4)


@given(CONTENT, st.sampled_from([None, 1]))
def test_content_comes_back(content: dict[str, Any], indent: int | None) -> None:
    assert unseal(seal(content, indent=indent)) == content


@given(CONTENT, CONTENT)
def test_other_content_under_the_same_checksum_is_noticed(
    content: dict[str, Any], other: dict[str, Any]
) -> None:
    forged = other | {"sha256": json.loads(seal(content))["sha256"]}
    if json.dumps(content, sort_keys=True) == json.dumps(other, sort_keys=True):
        assert unseal(json.dumps(forged)) == other
    else:
        with pytest.raises(DamagedError, match="checksum differs"):
            unseal(json.dumps(forged))


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("{", "not valid JSON"),
        ("[]", "no checksum"),
        ('{"a": 1}', "no checksum"),
        ("[" * 100_000, "nested too deeply"),
        (f'{{"a": {"9" * 5000}}}', "not valid JSON"),
        (b"\xff\xfe", "not (UTF-8|valid JSON)"),
    ],
)
def test_each_kind_of_damage_is_one_error(text: str | bytes, fault: str) -> None:
    with pytest.raises(DamagedError, match=fault):
        unseal(text)


def test_plain_json_is_parsed_without_a_checksum() -> None:
    assert parse_json('{"a": [1]}') == {"a": [1]}
