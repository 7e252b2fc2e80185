"""Names for rules: open to new names, closed to changed ones."""

from __future__ import annotations

import pytest

from gossamer.errors import ArgumentError, GossamerError, closest
from gossamer.registry import Registry


@pytest.fixture
def table() -> Registry[int]:
    table: Registry[int] = Registry("colour")
    table.register("red", 1)
    table.register("blue", 2)
    return table


def test_a_registry_is_a_mapping_in_order_of_registration(table):
    assert dict(table) == {"red": 1, "blue": 2}
    assert list(table) == ["red", "blue"]
    assert len(table) == 2
    assert "red" in table
    assert "green" not in table
    assert 3 not in table


def test_get_gives_its_default_as_every_mapping_does(table):
    assert table.get("red") == 1
    assert table.get("green") is None
    assert table.get("green", 5) == 5


def test_a_name_that_is_taken_is_refused_and_changes_nothing(table):
    with pytest.raises(ArgumentError, match="'red' is registered already"):
        table.register("red", 9)
    assert table["red"] == 1


@pytest.mark.parametrize("bad", ["", "two words", "2nd", "a-b"])
def test_a_name_that_is_no_identifier_is_refused(table, bad):
    with pytest.raises(ArgumentError, match="identifier"):
        table.register(bad, 9)


def test_an_unknown_name_is_answered_with_the_closest(table):
    with pytest.raises(ArgumentError, match=r"unknown colour 'blu'.*Closest: blue"):
        table["blu"]


def test_entries_cannot_be_set_or_deleted(table):
    with pytest.raises(TypeError):
        table["red"] = 3
    with pytest.raises(TypeError):
        del table["red"]


def test_closest_lists_what_is_near_or_else_everything():
    assert closest("convv1", ["conv1", "conv2", "fc"]) == "Closest: conv1, conv2."
    assert closest("xyz", ["conv1", "fc"]) == "Known: conv1, fc."
    assert closest("xyz", []) == "There is none to choose from."
    assert closest("?", map(str, range(30))).endswith(", ….")


def test_every_error_is_a_gossamer_error_and_a_builtin_one():
    assert issubclass(ArgumentError, GossamerError)
    assert issubclass(ArgumentError, ValueError)
