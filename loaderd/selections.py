"""What a stream selects: the query of its samples, and what shapes they have.

A user's condition stands in it as text, so it runs under the login without write rights.
"""

from __future__ import annotations

from typing import Any, LiteralString

import psycopg
from psycopg import sql

from catalog.errors import UsageError
from catalog.selection import checked, conditions, on_side, samples, side, unknown_structure
from loaderd.definitions import Definition

SELECT_TIMEOUT_S = 600  # for a selection, which holds a user's SQL

Connection = psycopg.Connection[tuple[Any, ...]]


def selection(definition: Definition) -> tuple[sql.Composed, dict[str, Any]]:
    """Return the query of what a stream feeds, and its parameters: sample_id, sample_key, annotation_ids, rows, columns.

    A `where` of the user's stands in it as text: it is checked to be one expression, and the login it runs under cannot write.
    """
    query, parameters = _live(definition) if definition.snapshot is None else _frozen(definition)
    if definition.limit is not None:
        query = sql.SQL("SELECT * FROM ({}) AS everything ORDER BY sample_key LIMIT %(limit)s").format(query)
    return query, {"structures": list(definition.structures), "labels": definition.labels, "limit": definition.limit, **parameters}


def _live(definition: Definition) -> tuple[sql.Composed, dict[str, Any]]:
    wanted = None if definition.split is None else side(definition.split)
    found, parameters = conditions(
        of_structures=definition.drawn, include_flagged=definition.include_flagged, origins=definition.origins, wanted=wanted
    )
    if definition.where is not None:
        # The newline ends a comment that the text may end with; % is doubled for psycopg.
        found.append(_text("(" + definition.where.replace("%", "%%") + "\n)"))
    if not definition.drawn:
        return sql.SQL("SELECT sample_id, sample_key, '{{}}'::bigint[] AS annotation_ids, rows, columns FROM image_all WHERE {}").format(
            sql.SQL(" AND ").join(found)
        ), parameters
    if definition.readers is not None:
        parameters["readers"] = list(definition.readers)
    found.append(
        _wanted(definition, "structure = ANY(%(structures)s) AND area_px IS NOT NULL", "structure = %(labels)s AND kind = 'label'")
    )
    query = sql.SQL(
        "SELECT sample_id, sample_key, {drawn} AS annotation_ids, rows, columns FROM {samples} WHERE {conditions} "
        "GROUP BY sample_id, sample_key, rows, columns"
    ).format(
        drawn=_by_structure(definition), samples=samples(definition.origins, definition.readers), conditions=sql.SQL(" AND ").join(found)
    )
    return query + _all_of(definition), parameters


def _frozen(definition: Definition) -> tuple[sql.Composed, dict[str, Any]]:
    """Flags play no part; what is revoked or was erased is left out. A file that is gone is not: it comes as unreadable."""
    parameters: dict[str, Any] = {"snapshot": definition.snapshot}
    found: list[sql.Composable] = [sql.SQL("t.name = %(snapshot)s AND k.image_id NOT IN (SELECT sample_id FROM revoked_image)")]
    if definition.split is not None:
        here, of_side = on_side(side(definition.split))
        found.append(here)
        parameters |= of_side
    of = sql.SQL("FROM snapshot t JOIN snapshot_sample k ON k.snapshot_id = t.id JOIN image i ON i.id = k.image_id")
    if not definition.drawn:
        return sql.SQL(
            "SELECT i.id AS sample_id, i.sample_key, '{{}}'::bigint[] AS annotation_ids, i.rows, i.columns {of} WHERE {conditions}"
        ).format(of=of, conditions=sql.SQL(" AND ").join(found)), parameters
    # Of what was a mask then the mask must still be there.
    found.append(
        _wanted(
            definition,
            "m.structure = ANY(%(structures)s) AND EXISTS (SELECT FROM mask WHERE mask.pairing_id = p.id)",
            "m.structure = %(labels)s AND a.kind = 'label'",
        )
    )
    query = sql.SQL(
        "SELECT i.id AS sample_id, i.sample_key, {drawn} AS annotation_ids, i.rows, i.columns {of} "
        "JOIN snapshot_mask m ON (m.snapshot_id, m.number) = (k.snapshot_id, k.number) "
        "JOIN pairing p ON p.id = m.pairing_id JOIN annotation a ON a.id = p.annotation_id WHERE {conditions} GROUP BY i.id"
    ).format(drawn=_by_structure(definition, "p.annotation_id"), of=of, conditions=sql.SQL(" AND ").join(found))
    return query + _all_of(definition), parameters


def _wanted(definition: Definition, masks: LiteralString, labels: LiteralString) -> sql.Composable:
    """Return the condition that a row is a mask or the label that the stream asks for."""
    if definition.labels is None:
        return sql.SQL(masks)
    return sql.SQL("({} OR {})").format(sql.SQL(masks), sql.SQL(labels)) if definition.structures else sql.SQL(labels)


def _by_structure(definition: Definition, of: LiteralString = "annotation_id") -> sql.Composed:
    """Return the array of a sample's annotation ids, by the stream's structures, then its label's; 0: none."""
    mask, label = "", ""
    if definition.labels is not None:
        mask, label = " AND kind <> 'label'", " AND kind = 'label'"
    one = "coalesce(max({of}) FILTER (WHERE structure = {name}{kind}), 0)"
    names = [(name, mask) for name in definition.structures] + ([(definition.labels, label)] if definition.labels is not None else [])
    each = [sql.SQL(one).format(of=sql.SQL(of), name=sql.Literal(name), kind=sql.SQL(kind)) for name, kind in names]
    return sql.SQL("ARRAY[{}]::bigint[]").format(sql.SQL(", ").join(each))


def _all_of(definition: Definition) -> sql.SQL:
    """Return the HAVING that a sample has everything that the stream asks for."""
    several = definition.require == "all" and len(definition.structures) > 1
    if definition.labels is None:
        return sql.SQL(" HAVING count(*) = cardinality(%(structures)s)" if several else "")
    if not definition.structures:
        return sql.SQL("")
    least: LiteralString = "cardinality(%(structures)s)" if several else "1"
    return sql.SQL(" HAVING bool_or(kind = 'label') AND count(*) FILTER (WHERE kind <> 'label') >= " + least)


def check_where(conn: Connection, definition: Definition) -> None:
    """Raise UsageError unless the user's `where` is one boolean expression over the view."""
    checked(conn, definition.where, "sample" if definition.drawn else "image_all", named=f"where={definition.where!r}")


def shapes(conn: Connection, definition: Definition) -> dict[tuple[int, int], int]:
    """Return (rows, columns) → number of samples of what the stream would feed now."""
    query, parameters = selection(definition)
    counted = sql.SQL("SELECT rows, columns, count(*) FROM ({}) AS s GROUP BY 1, 2 ORDER BY 3 DESC, 1, 2").format(query)
    return {(rows, columns): count for rows, columns, count in conn.execute(counted, parameters, prepare=True)}


def one_shape(conn: Connection, found: dict[tuple[int, int], int], definition: Definition) -> tuple[int, int]:
    """Return the only (rows, columns) of `shapes`, or raise UsageError saying which there are and what to pass."""
    if not found:
        what = [f"structures={list(definition.structures)!r}" if definition.structures else "any image"]
        what += [
            f"{name}={value!r}"
            for name in ("labels", "readers", "snapshot", "split", "where")
            if (value := getattr(definition, name)) is not None
        ]
        said = unknown_structure(conn, [*definition.structures, *([] if definition.labels is None else [definition.labels])])
        hint = f"structure {said}" if said else "see `catalog status`"
        raise UsageError(f"the stream is empty: no sample fits {', '.join(what)}; {hint}")
    if len(found) > 1 and definition.fixed_size is None:
        listed = ", ".join(f"{rows}×{columns} ({count})" for (rows, columns), count in found.items())
        rows, columns = next(iter(found))
        raise UsageError(
            f"images of {len(found)} shapes cannot share a batch: {listed} (rows×columns, samples); "
            f'pass where="rows = {rows} and columns = {columns}", or size=({rows}, {columns}) and fit='
        )
    return next(iter(found))


def _text(query: str) -> sql.SQL:
    # The only place here where text from a user becomes SQL; `check_where` has looked at it.
    return sql.SQL(query)
