"""Names of tools: the model can write each, no two are one, and each leads back to the client's."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nautile.server import ApiError
from nautile.server.toolnames import ToolNames

names = st.text(st.sampled_from("ab_-./:é"), min_size=1, max_size=4)
tools = st.lists(st.tuples(names, st.none() | names), unique=True, max_size=12)


@given(tools)
def test_names_are_written_told_apart_and_found_again(declared):
    seen = ToolNames()
    given_names = [seen.add(name, namespace) for name, namespace in declared]
    assert len(set(given_names)) == len(declared)
    assert all(re.fullmatch(r"[a-zA-Z0-9_-]+", name) for name in given_names)
    for (name, namespace), written in zip(declared, given_names, strict=True):
        assert seen.client(written) == (name, namespace)
        assert seen.seen(name, namespace) == written
    legal = [name for name, namespace in declared if namespace is None and re.fullmatch(r"[a-zA-Z0-9_-]+", name)]
    first = [name for name in legal if declared.index((name, None)) == 0]
    assert all(seen.seen(name) == name for name in first)


def test_two_of_one_name_are_refused():
    seen = ToolNames()
    seen.add("read")
    seen.add("read", "files")
    with pytest.raises(ApiError, match="unique"):
        seen.add("read")
    assert seen.seen("unknown.tool") == "unknown_tool" and seen.client("other") == ("other", None)
