"""The drop-in guide's table is that of tests/combinations.py, and its tests exist."""

from __future__ import annotations

from . import combinations


def test_the_page_is_up_to_date() -> None:
    assert combinations.PAGE.read_text() == combinations.page(), "docs/drop_in.md: run make docs-table"


def test_what_works_is_kept_by_a_test() -> None:
    where = combinations.places()
    for row in combinations.ROWS:
        assert set(row.tests) <= set(where), f"{row.feature}: no such test"
        assert row.tests or row.verdict == "with a condition", f"{row.feature}: no test"
