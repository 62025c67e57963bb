"""The data dictionary: what the database says of its own tables, views and columns."""

from __future__ import annotations

from typing import Any

import psycopg
from psycopg.rows import dict_row

from catalog.database import Database, explain
from catalog.errors import UsageError

# Those of the catalog's schema, each with its parts as JSON in one row.
RELATIONS = """
SELECT c.relname AS name, CASE c.relkind WHEN 'r' THEN 'table' ELSE 'view' END AS kind,
       coalesce(obj_description(c.oid, 'pg_class'), '') AS comment,
       (SELECT json_agg(json_build_object(
            'name', a.attname, 'type', format_type(a.atttypid, a.atttypmod), 'null', NOT a.attnotnull,
            'default', CASE WHEN a.attidentity <> '' THEN 'identity'
                       WHEN a.attgenerated <> '' THEN 'generated: ' || pg_get_expr(d.adbin, d.adrelid)
                       ELSE coalesce(pg_get_expr(d.adbin, d.adrelid), '') END,
            'comment', coalesce(col_description(c.oid, a.attnum), '')) ORDER BY a.attnum)
        FROM pg_attribute a LEFT JOIN pg_attrdef d ON d.adrelid = c.oid AND d.adnum = a.attnum
        WHERE a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped) AS columns,
       (SELECT coalesce(json_agg(json_build_object('name', k.conname, 'definition', pg_get_constraintdef(k.oid)) ORDER BY k.conname), '[]')
        FROM pg_constraint k WHERE k.conrelid = c.oid AND k.contype <> 'n') AS constraints,
       (SELECT coalesce(json_agg(json_build_object('name', x.relname, 'definition', pg_get_indexdef(x.oid)) ORDER BY x.relname), '[]')
        FROM pg_index i JOIN pg_class x ON x.oid = i.indexrelid WHERE i.indrelid = c.oid) AS indexes,
       (SELECT coalesce(json_agg(json_build_object('name', g.tgname, 'definition', pg_get_triggerdef(g.oid)) ORDER BY g.tgname), '[]')
        FROM pg_trigger g WHERE g.tgrelid = c.oid AND NOT g.tgisinternal) AS triggers
FROM pg_class c
WHERE c.relkind IN ('r', 'v') AND c.relnamespace = current_schema()::regnamespace AND c.relname <> 'alembic_version'
  AND c.relname = coalesce(%(name)s, c.relname)
ORDER BY c.relkind, c.relname
"""


def relations(database: Database, name: str | None = None) -> list[dict[str, Any]]:
    """Return tables, then views, by name: kind, comment, columns, constraints, indexes, triggers.

    Raises:
        UsageError: If there is none of this name.
    """
    try:
        with database.read_only() as conn, conn.cursor(row_factory=dict_row) as cursor:
            found = cursor.execute(RELATIONS, {"name": name}).fetchall()
    except psycopg.Error as error:
        raise explain(error, database) from error
    if not found:
        raise UsageError(f"{name}: there is no such table or view; `catalog schema` lists them")
    return found
