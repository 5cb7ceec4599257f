"""The groups of rows that read a prefix together: valid for any page tables, and the best of all flat groupings."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pshare_jax.model import paged_batch
from pshare_jax.model.paged_batch import shared_prefixes

pytestmark = pytest.mark.host


@st.composite
def tables(draw):
    """Page tables that are paths in a tree: a page follows the same pages in all of them."""
    paths = draw(st.lists(st.lists(st.integers(0, 1), max_size=5), max_size=6))
    return [[1 + int("1" + "".join(map(str, path[: end + 1])), 2) for end in range(len(path))] for path in paths]


def _groupings(rows):
    if not rows:
        yield []
        return
    first, *rest = rows
    for others in _groupings(rest):
        yield [[first], *others]
        for index, group in enumerate(others):
            yield [*others[:index], [first, *group], *others[index + 1 :]]


def _saved(group, tables):
    common = 0
    while all(len(tables[row]) > common and tables[row][common] == tables[group[0]][common] for row in group):
        common += 1
    return (len(group) - 1) * common


@settings(max_examples=60, deadline=None, derandomize=True)
@given(tables())
def test_groups_are_valid_and_save_most(tables):
    shared = shared_prefixes(tables, [256 * len(table) for table in tables], 256)
    saved = 0
    for leader in set(shared.leaders[shared.num_pages > 0].tolist()):
        rows = [row for row in range(len(tables)) if shared.num_pages[row] and shared.leaders[row] == leader]
        num_pages = int(shared.num_pages[leader])
        assert leader in rows
        assert all(
            shared.num_pages[row] == num_pages and tables[row][:num_pages] == tables[leader][:num_pages] for row in rows
        )
        assert all(len(tables[row]) >= num_pages for row in rows)
        saved += (len(rows) - 1) * num_pages
    assert saved == max(
        sum(_saved(group, tables) for group in groups) for groups in _groupings(list(range(len(tables))))
    )


def test_prefixes_too_short_to_pay_are_not_shared():
    length = paged_batch.MIN_SHARED_TOKENS
    pages = list(range(1, length // 16 + 1))
    assert (
        shared_prefixes([[*pages, 90], [*pages, 91]], [length + 1, length + 16], 16).num_pages.tolist()
        == [len(pages)] * 2
    )
    # The last page is not full in one of the rows, so the other's tokens there are its own.
    assert not shared_prefixes([pages, pages], [length, length - 1], 16).num_pages.any()
