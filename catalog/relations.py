"""Which structure lies inside which: what people say, for the rules."""

from __future__ import annotations

from dataclasses import dataclass, field

from catalog.database import Database
from catalog.errors import CatalogError, UsageError
from catalog.flags import person, transaction, written

# Everything that lies around a structure, step by step.
AROUND = """
WITH RECURSIVE around (name) AS (
    SELECT outside FROM relation WHERE inside = %s UNION SELECT r.outside FROM relation r JOIN around a ON a.name = r.inside
) SELECT EXISTS (SELECT FROM around WHERE name = %s)
"""


@dataclass(slots=True)
class Related:
    """What was said."""

    inside: str
    outside: str
    changed: bool  # not so before
    unknown: list[str] = field(default_factory=list)  # no annotation is of that structure yet


def relate(
    database: Database, inside: str, outside: str, *, reason: str, remove: bool = False, actor: str | None = None, dry_run: bool = False
) -> Related:
    """Say that one structure lies inside another one, or with `remove` that nothing is known of that.

    Raises:
        UsageError: If the two are the same.
        CatalogError: If the outer one is said to lie inside the inner one, or what is to be removed was not said.
    """
    inside, outside = written(inside, "INSIDE"), written(outside, "OUTSIDE")
    reason, actor = written(reason, "-m"), person(actor)
    if inside == outside:
        raise UsageError(f"{inside}: cannot lie inside itself; name two structures")
    with transaction(database, dry_run=dry_run) as conn:
        conn.execute("SELECT set_config('catalog.actor', %s, true), set_config('catalog.reason', %s, true)", [actor, reason])
        known = {name for (name,) in conn.execute("SELECT name FROM structure WHERE name = ANY(%s)", [[inside, outside]])}
        said = conn.execute("SELECT EXISTS (SELECT FROM relation WHERE (inside, outside) = (%s, %s))", [inside, outside]).fetchone() == (
            True,
        )
        done = Related(inside, outside, remove or not said, sorted({inside, outside} - known))
        if remove:
            if not said:
                raise CatalogError(f"{inside} inside {outside}: nobody said so, so there is nothing to remove; see `catalog qa relate`")
            conn.execute("DELETE FROM relation WHERE (inside, outside) = (%s, %s)", [inside, outside])
        elif not said:
            if conn.execute(AROUND, [outside, inside]).fetchone() == (True,):
                raise CatalogError(f"{inside} inside {outside}: {outside} is said to lie inside {inside}; remove that first")
            conn.execute("INSERT INTO relation (inside, outside, actor) VALUES (%s, %s, %s)", [inside, outside, actor])
    return done


def listed(database: Database) -> list[tuple[str, str, str]]:
    """Return (inside, outside, who said so), in order of names."""
    with transaction(database) as conn:
        return [
            (inside, outside, actor) for inside, outside, actor in conn.execute("SELECT inside, outside, actor FROM relation ORDER BY 1, 2")
        ]
