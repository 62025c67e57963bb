"""Which positions a rank gets: arithmetic that must deal out every position once, whatever the numbers."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from loaderd.shares import Share, Span, without

numbers = st.integers(0, 60)


def positions(spans: list[Span]) -> list[int]:
    return [position for first, end in spans for position in range(first, end)]


@given(numbers, st.integers(1, 7), st.integers(1, 6), st.sampled_from(["short", "drop", "pad"]), st.integers(0, 5), st.integers(0, 40))
def test_every_position_goes_to_one_rank_or_is_dropped(samples: int, size: int, ranks: int, tail: str, step: int, begin: int) -> None:
    """All ranks have the same number of batches, of sizes that differ by at most one; together they and what is dropped are everything."""
    shares = [Share(samples, size, rank, ranks, tail, step, min(begin, samples)) for rank in range(ranks)]
    assert len({share.steps for share in shares}) == 1 and len({share.end for share in shares}) == 1
    one = shares[0]
    dealt: list[int] = []
    for at in range(step, one.steps):
        spans = [share.span(at) for share in shares]
        sizes = {end - first for first, end in spans}
        assert min(sizes) >= 1 and max(sizes) <= size and max(sizes) - min(sizes) <= 1
        assert sizes == {size} or at == one.steps - 1
        # Step by step a prefix of the order: what a state of any number of ranks can go on from.
        assert spans[0][0] == one.begins(at) and spans[-1][1] == one.begins(at + 1)
        dealt += positions(spans)
    assert dealt == list(range(min(begin, samples), one.end))
    dropped = samples - one.end
    assert dropped == 0 or not one.rest
    assert dropped < (size * ranks if tail == "drop" else ranks)
    for share in shares:
        assert positions(share.spans(step, share.steps)) == positions([share.span(at) for at in range(step, share.steps)])


@given(numbers, st.integers(1, 5), st.lists(st.tuples(st.integers(1, 5), st.integers(0, 4)), min_size=1, max_size=6))
def test_any_numbers_of_ranks_go_on_in_one_order(samples: int, size: int, attempts: list[tuple[int, int]]) -> None:
    """Attempts of different numbers of ranks, each for some steps, deal out the order once and without a gap."""
    dealt: list[int] = []
    step = begin = 0
    for ranks, steps in [*attempts, (1, 10**6)]:
        shares = [Share(samples, size, rank, ranks, "short", step, begin) for rank in range(ranks)]
        until = min(step + steps, shares[0].steps)
        for at in range(step, until):
            dealt += positions([share.span(at) for share in shares])
        ended = until == shares[0].steps
        step, begin = until, shares[0].begins(until)
        if ended:
            break
    assert dealt == list(range(begin))
    assert samples - begin < max(ranks for ranks, _ in [*attempts, (1, 1)])


@given(st.lists(st.tuples(numbers, st.integers(1, 9)), max_size=5), st.sets(st.integers(0, 200)))
def test_without(pieces: list[tuple[int, int]], holes: set[int]) -> None:
    """Taking positions out of spans leaves exactly the others, ascending and not empty."""
    spans, at = [], 0
    for gap, length in pieces:
        spans.append((at + gap, at + gap + length))
        at += gap + length
    left = without(spans, list(holes))
    assert positions(left) == [position for position in positions(spans) if position not in holes]
    assert all(first < end for first, end in left)
