"""Audits: the views that an auditor opens; and triggers that write with the owner's rights, so that no role needs rights on the log."""

from pathlib import Path

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None

# What the triggers write nobody else does: whoever may change a flag must leave an event, and may not write one of his own.
# pg_temp comes last: else a temporary table named event would take what belongs into the log.
FUNCTIONS = """
SELECT format('ALTER FUNCTION %s SECURITY DEFINER SET search_path = %I, pg_temp', f.oid::regprocedure, n.nspname)
FROM pg_proc f JOIN pg_namespace n ON n.oid = f.pronamespace
WHERE n.nspname = current_schema() AND f.prorettype = 'trigger'::regtype AND f.proname ~ '^(record|touch)_|^note_catalog_change$'
ORDER BY 1
"""


def upgrade() -> None:
    for (statement,) in op.get_bind().execute(sa.text(FUNCTIONS.replace("::", "\\:\\:"))).fetchall():
        op.execute(statement)
    for statement in Path(__file__).with_suffix(".sql").read_text("utf-8").split(";\n"):
        if statement.strip():
            op.execute(sa.text(statement.replace(":", "\\:")))


def downgrade() -> None:
    raise RuntimeError("an event log is not taken away: restore a dump instead")
