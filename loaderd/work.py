"""What a worker needs for each position of an epoch: where the pixels lie, and the masks.

About 1,000 positions are fetched by one query, in which the server itself writes each sample's row as JSON: it is passed on to the workers
unread.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, LiteralString

import psycopg
from psycopg import sql

from catalog.errors import CatalogError
from loaderd import ledger, orders
from loaderd.definitions import Definition
from loaderd.neighbours import LOCATED, LOCATION, Neighbours, with_neighbours
from loaderd.orders import Plan
from loaderd.shares import Span

KEPT = 16_384  # samples: streams of up to so many keep their work (about 1 KB a sample) while the catalog stands still
Connection = psycopg.Connection[tuple[Any, ...]]

# A text that is no number has one by its place among the classes that the stream began with.
LABEL = sql.SQL(
    "CASE WHEN %(classes)s::text[] IS NOT NULL THEN array_position(%(classes)s::text[], la.label) - 1 "
    "WHEN la.label ~ '^[+-]?[0-9]{1,18}$' THEN la.label::bigint END"
)


def work_query(definition: Definition) -> sql.Composed:
    """Return the query of the work for positions of an epoch: a row and the masks' bits for each.

    The annotations are those of the order, not those that are current now: an epoch is fed as it was planned. The masks' boxes and bits
    stand in the order of the stream's structures, null and nothing where there is none. A join a structure: one lateral join for all
    took twice as long. Of a stream that is fed more than images and masks a row has label, pixel spacing and neighbours, too.
    """
    structures = len(definition.structures)
    numbers = range(1, structures + 1)
    more, joins = sql.Composed([]), sql.Composed([])
    if not definition.plain:
        more = sql.SQL(", {}, json_build_array(i.row_spacing, i.column_spacing)").format(LABEL if definition.labels else sql.SQL("NULL"))
    if definition.labels is not None:
        joins = sql.SQL("LEFT JOIN annotation la ON la.id = s.a{} ").format(sql.SQL(str(structures + 1)))

    def each(text: LiteralString, between: LiteralString) -> sql.Composed:
        return sql.SQL(between).join(sql.SQL(text).format(k=sql.SQL(str(number))) for number in numbers)

    boxes = each(
        "CASE WHEN m{k}.bits IS NOT NULL THEN json_build_array(m{k}.box_row, m{k}.box_column, m{k}.box_rows, m{k}.box_columns) END", ", "
    )
    bits = each("coalesce(m{k}.bits, '')", " || ") if structures else sql.SQL("''::bytea")
    drawn_numbers = [sql.SQL(str(number)) for number in range(1, definition.annotations + 1)]
    slices = sql.SQL("").join(
        sql.SQL(", e.annotation_ids[cardinality(e.sample_ids) * ({k} - 1) + 1 : cardinality(e.sample_ids) * {k}]").format(k=number)
        for number in drawn_numbers
    )
    drawn = sql.SQL("").join(sql.SQL(", a{}").format(number) for number in drawn_numbers)
    masks = each(
        "LEFT JOIN pairing p{k} ON p{k}.annotation_id = s.a{k} AND p{k}.image_id = i.id LEFT JOIN mask m{k} ON m{k}.pairing_id = p{k}.id ",
        "",
    )
    return sql.SQL(
        "SELECT convert_to(json_build_array({location}, json_build_array({boxes}){more})::text, 'UTF8'), {bits} "
        "FROM epoch_order e CROSS JOIN LATERAL unnest(e.sample_ids{slices}) WITH ORDINALITY AS s (id{drawn}, n) "
        "JOIN image i ON i.id = s.id {located}{masks}{joins}"
        "WHERE e.epoch_id = %(epoch)s AND e.part BETWEEN %(first)s / %(part)s AND (%(end)s - 1) / %(part)s "
        "AND e.part * %(part)s + s.n - 1 <@ %(positions)s::int8multirange ORDER BY e.part, s.n"
    ).format(
        location=sql.SQL(LOCATION), located=sql.SQL(LOCATED), boxes=boxes, bits=bits, slices=slices, drawn=drawn, masks=masks, more=more,
        joins=joins,
    )  # fmt: skip


class Work:
    """Fetches the work of one stream; of a small one it is kept while the catalog stands still."""

    def __init__(self, definition: Definition, classes: Sequence[str] | None) -> None:
        """`classes`: what the stream's labels that are no numbers are counted by."""
        self._parameters = {"part": orders.PART} if definition.labels is None else {"part": orders.PART, "classes": classes}
        self._query = work_query(definition)
        self._around = Neighbours(definition.context) if definition.context else None
        self._kept: dict[int, tuple[bytes, bytes]] = {}
        self._kept_for = -1  # the change counter of the plan that the kept work belongs to

    def fetch(self, conn: Connection, plan: Plan, spans: Sequence[Span]) -> tuple[list[int], list[tuple[bytes, bytes]]] | None:
        """Return the sample ids at some positions, and for each its row and its masks' bits; None if the order has them no more.

        Raises:
            CatalogError: If a sample is gone from the catalog.
        """
        if plan.catalog_changes != self._kept_for:
            self._kept, self._kept_for = {}, plan.catalog_changes
            if self._around is not None:
                self._around.forget()
        samples = _samples(conn, plan, spans)
        if len(samples) < sum(end - first for first, end in spans):
            return None
        work = [kept for sample in samples if (kept := self._kept.get(sample)) is not None]
        if len(work) < len(samples):
            where = {"epoch": plan.epoch_id, "first": spans[0][0], "end": spans[-1][1], "positions": ledger.multirange(spans)}
            with conn.cursor(binary=True) as cursor:
                work = cursor.execute(self._query, {**self._parameters, **where}, prepare=True).fetchall()
            if len(work) < len(samples):
                raise CatalogError(f"epoch {plan.epoch}: of {len(samples)} positions only {len(work)} have an image; was a patient erased?")
            if self._around is not None:
                work = with_neighbours(work, self._around.rows(conn, samples))
            if plan.num_samples <= KEPT:
                self._kept.update(zip(samples, work, strict=True))
        return samples, work


def _samples(conn: Connection, plan: Plan, spans: Sequence[Span]) -> list[int]:
    """Return the sample ids at some positions."""
    first, last = spans[0][0] // orders.PART, (spans[-1][1] - 1) // orders.PART
    parts = conn.execute(
        "SELECT sample_ids FROM epoch_order WHERE epoch_id = %s AND part BETWEEN %s AND %s ORDER BY part",
        [plan.epoch_id, first, last],
        binary=True,
    )
    samples = [sample for (part,) in parts for sample in part]
    base = first * orders.PART
    return [sample for start, end in spans for sample in samples[start - base : end - base]]
