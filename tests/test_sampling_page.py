"""The page on sampling says what was measured, and the arms that it compares are what it calls them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks import sampling

REPOSITORY = Path(__file__).resolve().parent.parent


def test_the_page_s_tables_are_the_results() -> None:
    """docs/sampling.md has the tables that `benchmarks/sampling.py --again` prints from the stored results, all of them and no other."""
    pytest.importorskip("scipy")
    page = (REPOSITORY / "docs" / "sampling.md").read_text()
    written = [line for line in page.splitlines() if line.startswith("|")]
    report = json.loads((REPOSITORY / "docs" / "sampling.json").read_text())
    assert written == [line for line in sampling.table(report).splitlines() if line]


@pytest.mark.parametrize(("count", "epochs"), [(1, 3), (18, 40), (100, 10)])
def test_the_arms_are_what_they_are_called(count: int, epochs: int) -> None:
    """Permutations have each sample once an epoch, in a new order or in the same; replacement leaves out as many as theory says."""
    every = np.arange(count)
    drawn = {arm: sampling.order(arm, count, epochs, np.random.default_rng(1)) for arm in sampling.ARMS}
    for arm in ("permutation", "same order"):
        assert drawn[arm].shape == (epochs, count)
        assert (np.sort(drawn[arm]) == every).all()
    assert (drawn["same order"] == drawn["same order"][0]).all()
    assert drawn["replacement"].shape == (epochs, count)
    assert np.isin(drawn["replacement"], every).all()
    if count > 1:
        assert len(np.unique(drawn["permutation"], axis=0)) == epochs
        missing = 1 - np.mean([len(np.unique(row)) for row in drawn["replacement"]]) / count
        assert abs(missing - (1 - 1 / count) ** count) < 0.05
