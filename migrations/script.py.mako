"""${message}

Rules for whoever writes here: a number one higher as revision, the same number as SCHEMA_VERSION in catalog/database.py;
additive where possible, since an older daemon may still be running; never wait long for a lock (env.py sets the limits);
a column dropped only one release after the last code that reads it.
"""

from alembic import op
import sqlalchemy as sa
${imports if imports else ""}

revision = ${repr(up_revision)}
down_revision = ${repr(down_revision)}
branch_labels = None
depends_on = None


def upgrade() -> None:
    ${upgrades if upgrades else "pass"}


def downgrade() -> None:
    ${downgrades if downgrades else "pass"}
