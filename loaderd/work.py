"""The query of what a worker needs for each position of an epoch: where the pixels lie, and the masks."""

from __future__ import annotations

from typing import LiteralString

from psycopg import sql

from loaderd.definitions import Definition
from loaderd.neighbours import LOCATED, LOCATION

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
