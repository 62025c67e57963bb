"""Runs that survive: named streams, attempts, consumers, notes on runs, revocation, pruning, and the views that prove what was fed."""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects.postgresql import JSONB

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

# A later attempt that begins at or before a position replaces what earlier ones made of it: the model went on from a state in which
# that had not happened. What counts of a ledger row is what lies before the earliest beginning of any later attempt; the rest of it
# was seen by a model that was thrown away, and is counted as replayed.
LEDGER_EFFECTIVE = """
CREATE VIEW ledger_effective AS
SELECT l.id, l.epoch_id, e.run_id, e.stream_id, e.epoch, l.attempt, l.rank, l.outcome, l.consumer, l.at,
       l.positions * w.counts AS positions, l.acknowledged * w.counts AS acknowledged, l.positions - w.counts AS replayed
FROM ledger l
JOIN epoch e ON e.id = l.epoch_id
LEFT JOIN LATERAL (
    SELECT t.epoch, t.position FROM attempt t
    WHERE t.run_id = e.run_id AND t.stream_id = e.stream_id AND t.attempt > l.attempt ORDER BY t.epoch, t.position LIMIT 1
) later ON true
CROSS JOIN LATERAL (
    SELECT CASE WHEN later.epoch IS NULL OR e.epoch < later.epoch THEN '{(,)}'::int8multirange
                WHEN e.epoch = later.epoch THEN int8multirange(int8range(NULL, later.position))
                ELSE '{}'::int8multirange END AS counts
) w
"""

# How far each epoch must be accounted for: to its end once it is over (the newest attempt began behind it, or all its ranks had
# everything of it), else as far as every rank has reserved. Of a rank that attached more than once the newest row counts.
EPOCH_COVERAGE = """
CREATE VIEW epoch_coverage AS
SELECT r.name AS run, e.stream_id AS stream, e.epoch, e.num_samples AS planned,
       length_of(c.delivered) AS delivered, length_of(c.acknowledged) AS acknowledged, length_of(c.dropped) AS dropped,
       length_of(c.revoked) AS revoked, length_of(c.unreadable) AS unreadable,
       due.upto - length_of(c.touched * int8multirange(int8range(0, due.upto))) AS missing,
       coalesce(c.length, 0) - length_of(c.touched) AS twice,
       s.name AS stream_name, due.over AS finished, length_of(c.replayed) AS replayed, e.order_sha256, e.started_at, e.pruned_at
FROM epoch e
JOIN run r ON r.id = e.run_id
JOIN stream s ON s.id = e.stream_id
LEFT JOIN LATERAL (
    SELECT * FROM attempt t WHERE t.run_id = e.run_id AND t.stream_id = e.stream_id ORDER BY t.attempt DESC LIMIT 1
) newest ON true
LEFT JOIN LATERAL (
    SELECT count(*) FILTER (WHERE k.ended_epoch >= e.epoch) AS ended, count(*) AS ranks,
           min(CASE WHEN k.ended_epoch >= e.epoch OR k.reserved_epoch > e.epoch THEN e.num_samples
                    WHEN k.reserved_epoch = e.epoch THEN k.reserved_to ELSE 0 END) AS reserved_to
    FROM (
        SELECT o.rank, max(o.ended_epoch) AS ended_epoch,
               (array_agg(o.reserved_epoch ORDER BY o.id DESC) FILTER (WHERE o.reserved_epoch IS NOT NULL))[1] AS reserved_epoch,
               (array_agg(o.reserved_to ORDER BY o.id DESC) FILTER (WHERE o.reserved_epoch IS NOT NULL))[1] AS reserved_to
        FROM consumer o
        WHERE o.run_id = e.run_id AND o.stream_id = e.stream_id AND o.attempt = newest.attempt GROUP BY o.rank
    ) k
) ranks ON true
CROSS JOIN LATERAL (
    SELECT over, CASE WHEN over THEN e.num_samples
                      ELSE greatest(CASE WHEN newest.epoch = e.epoch THEN newest.position ELSE 0 END,
                                    CASE WHEN ranks.ranks >= newest.num_ranks THEN least(ranks.reserved_to, e.num_samples) ELSE 0 END)
                 END AS upto
    FROM (SELECT coalesce(newest.epoch > e.epoch OR ranks.ended >= newest.num_ranks, false) AS over) o
) due
LEFT JOIN LATERAL (
    SELECT range_agg(l.positions) AS touched, sum(length_of(l.positions))::bigint AS length,
           range_agg(l.positions) FILTER (WHERE l.outcome = 'delivered') AS delivered, range_agg(l.acknowledged) AS acknowledged,
           range_agg(l.positions) FILTER (WHERE l.outcome = 'dropped') AS dropped,
           range_agg(l.positions) FILTER (WHERE l.outcome = 'revoked') AS revoked,
           range_agg(l.positions) FILTER (WHERE l.outcome = 'unreadable') AS unreadable,
           range_agg(l.replayed) FILTER (WHERE l.outcome = 'delivered') AS replayed
    FROM ledger_effective l WHERE l.epoch_id = e.id
) c ON true
WHERE e.pruned_at IS NULL AND (e.started_at IS NOT NULL OR EXISTS (SELECT FROM ledger l WHERE l.epoch_id = e.id))
UNION ALL
SELECT r.name, e.stream_id, e.epoch, e.num_samples, (e.summary->>'delivered')::bigint, (e.summary->>'acknowledged')::bigint,
       (e.summary->>'dropped')::bigint, (e.summary->>'revoked')::bigint, (e.summary->>'unreadable')::bigint,
       (e.summary->>'missing')::bigint, (e.summary->>'twice')::bigint, s.name, (e.summary->>'finished')::boolean,
       (e.summary->>'replayed')::bigint, e.order_sha256, e.started_at, e.pruned_at
FROM epoch e
JOIN run r ON r.id = e.run_id
JOIN stream s ON s.id = e.stream_id
WHERE e.pruned_at IS NOT NULL
"""

# One row for each time that a sample was delivered, also where a later attempt replaced it: somebody's pixels were read all the same.
SAMPLE_HISTORY = """
CREATE VIEW sample_history AS
SELECT pt.patient_id AS patient, i.id AS sample_id, i.sample_key, r.name AS run, s.name AS stream_name, e.stream_id AS stream,
       e.epoch, seen.attempt, seen.rank, o.part * 1024 + p.n - 1 AS position, seen.acknowledged, seen.replayed, seen.consumer, seen.at,
       models.sha256 AS models
FROM epoch e
JOIN run r ON r.id = e.run_id
JOIN stream s ON s.id = e.stream_id
JOIN epoch_order o ON o.epoch_id = e.id
CROSS JOIN LATERAL unnest(o.sample_ids) WITH ORDINALITY AS p (sample_id, n)
JOIN image i ON i.id = p.sample_id
JOIN instance ins ON ins.id = i.instance_id
JOIN series se ON se.id = ins.series_id
JOIN study st ON st.id = se.study_id
JOIN patient pt ON pt.id = st.patient_id
JOIN LATERAL (
    SELECT l.attempt, l.rank, l.consumer, l.at, o.part * 1024 + p.n - 1 <@ l.acknowledged AS acknowledged,
           o.part * 1024 + p.n - 1 <@ l.replayed AS replayed
    FROM ledger_effective l
    WHERE l.epoch_id = e.id AND l.outcome = 'delivered'
      AND (o.part * 1024 + p.n - 1 <@ l.positions OR o.part * 1024 + p.n - 1 <@ l.replayed)
) seen ON true
LEFT JOIN LATERAL (
    SELECT array_agg(encode(n.model_sha256, 'hex') ORDER BY n.id) AS sha256 FROM run_note n
    WHERE n.run_id = e.run_id AND n.model_sha256 IS NOT NULL
) models ON true
UNION ALL
SELECT pt.patient_id, NULL, NULL, r.name, s.name, e.stream_id, e.epoch, NULL, NULL, NULL, NULL, NULL, NULL, e.started_at, models.sha256
FROM epoch e
JOIN run r ON r.id = e.run_id
JOIN stream s ON s.id = e.stream_id
JOIN patient pt ON pt.id = ANY (e.patients)
LEFT JOIN LATERAL (
    SELECT array_agg(encode(n.model_sha256, 'hex') ORDER BY n.id) AS sha256 FROM run_note n
    WHERE n.run_id = e.run_id AND n.model_sha256 IS NOT NULL
) models ON true
WHERE e.pruned_at IS NOT NULL
"""

RUN_PROVENANCE = """
CREATE VIEW run_provenance AS
SELECT r.name AS run, f.stream_id AS stream, s.name AS stream_name, encode(s.digest, 'hex') AS stream_sha256, s.definition,
       NULL::text AS snapshot_sha256, coalesce(s.definition->'transforms', '[]'::jsonb) AS transforms,
       (SELECT array_agg(encode(e.order_sha256, 'hex') ORDER BY e.epoch) FROM epoch e
        WHERE e.run_id = r.id AND e.stream_id = s.id AND e.started_at IS NOT NULL) AS order_sha256s,
       (SELECT count(*) FROM attempt t WHERE t.run_id = r.id AND t.stream_id = s.id) AS attempts,
       (SELECT jsonb_agg(DISTINCT t.versions) FROM attempt t WHERE t.run_id = r.id AND t.stream_id = s.id) AS daemon_versions,
       (SELECT jsonb_agg(DISTINCT c.versions) FROM consumer c WHERE c.run_id = r.id AND c.stream_id = s.id) AS trainer_versions,
       (SELECT array_agg(DISTINCT c.host || ':' || c.pid || ' rank ' || c.rank || ' of ' || c.num_ranks) FROM consumer c
        WHERE c.run_id = r.id AND c.stream_id = s.id) AS consumers,
       (SELECT array_agg(encode(n.model_sha256, 'hex') ORDER BY n.id) FROM run_note n
        WHERE n.run_id = r.id AND n.model_sha256 IS NOT NULL) AS models,
       r.program_version, r.host, r.created_at
FROM run r
JOIN (SELECT run_id, stream_id FROM attempt UNION SELECT run_id, stream_id FROM epoch) f ON f.run_id = r.id
JOIN stream s ON s.id = f.stream_id
"""

# What an open flag that revokes speaks of, down to the images.
REVOKED_IMAGE = """
CREATE VIEW revoked_image AS
WITH revoking AS (SELECT * FROM flag WHERE revokes AND state = 'open')
SELECT image_id AS sample_id FROM revoking WHERE image_id IS NOT NULL
UNION SELECT l.image_id FROM revoking f JOIN location l ON l.file_id = f.file_id
UNION SELECT p.image_id FROM revoking f JOIN pairing p ON p.id = f.pairing_id
UNION SELECT p.image_id FROM revoking f JOIN pairing p ON p.annotation_id = f.annotation_id AND p.state <> 'rejected'
UNION SELECT i.id FROM revoking f JOIN instance n ON n.series_id = f.series_id JOIN image i ON i.instance_id = n.id
UNION SELECT i.id FROM revoking f JOIN series se ON se.study_id = f.study_id JOIN instance n ON n.series_id = se.id
      JOIN image i ON i.instance_id = n.id
UNION SELECT i.id FROM revoking f JOIN study st ON st.patient_id = f.patient_id JOIN series se ON se.study_id = st.id
      JOIN instance n ON n.series_id = se.id JOIN image i ON i.instance_id = n.id
"""

COMMENTS = {
    "ledger_effective": "The ledger, less what a later attempt replaced (column replayed).",
    "epoch_coverage": "What became of every position of every epoch. missing and twice must be 0, also while it is fed and after any crash.",
    "sample_history": "Each time that a sample was delivered, to which run and models. Ask for a patient. Of pruned epochs: patients alone.",
    "run_provenance": "What a run was fed: definition, digests of the orders, versions, consumers, models.",
    "revoked_image": "Images of which nothing is fed: an open flag on them, or on what they belong to, revokes.",
}

# Daemons listen: a revocation must act within a second, and the end of a stream at once.
NOTIFY = """
CREATE FUNCTION notify_daemons() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    PERFORM pg_notify('scanfeed', TG_TABLE_NAME);
    RETURN NULL;
END $$;
CREATE TRIGGER notify_daemons AFTER INSERT ON flag FOR EACH ROW WHEN (NEW.revokes) EXECUTE FUNCTION notify_daemons();
CREATE TRIGGER notify_daemons_of_changes AFTER UPDATE ON flag FOR EACH ROW WHEN (NEW.revokes OR OLD.revokes)
    EXECUTE FUNCTION notify_daemons();
CREATE TRIGGER notify_daemons AFTER UPDATE ON stream FOR EACH ROW WHEN (NEW.ended_at IS NOT NULL) EXECUTE FUNCTION notify_daemons();
"""

# Runs of before: one attempt each, by one trainer, done with every epoch of which all positions have a row.
CARRY_OVER = """
INSERT INTO attempt (run_id, stream_id, attempt, num_ranks, epoch, step, position)
SELECT DISTINCT run_id, stream_id, 1, 1, 0, 0, 0 FROM epoch WHERE started_at IS NOT NULL;
DELETE FROM ledger d USING (SELECT epoch_id, range_agg(positions) AS positions FROM ledger WHERE outcome = 'unreadable' GROUP BY epoch_id) u
WHERE d.epoch_id = u.epoch_id AND d.outcome = 'delivered' AND d.positions <@ u.positions;
UPDATE ledger d SET positions = d.positions - u.positions, acknowledged = d.acknowledged - u.positions
FROM (SELECT epoch_id, range_agg(positions) AS positions FROM ledger WHERE outcome = 'unreadable' GROUP BY epoch_id) u
WHERE d.epoch_id = u.epoch_id AND d.outcome = 'delivered' AND d.positions && u.positions;
INSERT INTO consumer (run_id, stream_id, attempt, rank, num_ranks, host, pid, uid, daemon_pid, attached_at, left_at, ended_epoch)
SELECT e.run_id, e.stream_id, 1, 0, 1, r.host, 0, 0, 0, min(e.started_at), max(e.started_at), max(e.epoch) FILTER (
    WHERE e.num_samples = (SELECT length_of(range_agg(l.positions)) FROM ledger l WHERE l.epoch_id = e.id))
FROM epoch e JOIN run r ON r.id = e.run_id WHERE e.started_at IS NOT NULL GROUP BY e.run_id, e.stream_id, r.host
"""


def _id() -> sa.Column[int]:
    comment = "Surrogate key; means nothing outside this database."
    return sa.Column("id", sa.BigInteger(), sa.Identity(always=True), nullable=False, comment=comment)


def _now(name: str, comment: str) -> sa.Column[object]:
    return sa.Column(name, sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False, comment=comment)


def upgrade() -> None:
    op.drop_constraint("uq_stream_name", "stream")
    ended = "When it was ended: nobody attaches any more, and its name is free again."
    op.add_column("stream", sa.Column("ended_at", sa.DateTime(timezone=True), comment=ended))
    op.create_index("ix_stream_name", "stream", ["name"], unique=True, postgresql_where=sa.text("ended_at IS NULL"))
    op.create_check_constraint(op.f("ck_stream_name"), "stream", "name <> ''")

    op.create_table(
        "run_note",
        _id(),
        sa.Column("run_id", sa.BigInteger(), nullable=False, comment="The training."),
        _now("at", "When it was noted."),
        sa.Column("actor", sa.Text(), nullable=False, comment="Who noted it."),
        sa.Column("note", sa.Text(), server_default="", nullable=False, comment="In words."),
        sa.Column("model_sha256", sa.LargeBinary(), nullable=True, comment="sha256 of a model that this training made."),
        sa.CheckConstraint("length(model_sha256) = 32", name=op.f("ck_run_note_model_sha256")),
        sa.CheckConstraint("note <> '' OR model_sha256 IS NOT NULL", name=op.f("ck_run_note_says_something")),
        sa.ForeignKeyConstraint(["run_id"], ["run.id"], name=op.f("fk_run_note_run_id_run")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_run_note")),
        comment="What became of a training: the models it made, and remarks.",
    )
    op.create_index(op.f("ix_run_note_run_id"), "run_note", ["run_id"])

    op.create_table(
        "attempt",
        _id(),
        sa.Column("run_id", sa.BigInteger(), nullable=False, comment="The training."),
        sa.Column("stream_id", sa.BigInteger(), nullable=False, comment="What is fed."),
        sa.Column("attempt", sa.Integer(), nullable=False, comment="Uninterrupted stretch of the run on this stream, from 1."),
        sa.Column("num_ranks", sa.Integer(), nullable=False, comment="Training processes that share its batches."),
        sa.Column("epoch", sa.Integer(), nullable=False, comment="Epoch in which it begins."),
        sa.Column(
            "step",
            sa.Integer(),
            nullable=False,
            comment="Its first step in that epoch; steps before it were made by earlier attempts.",
        ),
        sa.Column("position", sa.BigInteger(), nullable=False, comment="Position in that epoch at which its first step begins."),
        sa.Column(
            "versions",
            JSONB(),
            server_default="{}",
            nullable=False,
            comment="What the daemon that opened it ran on: package → version.",
        ),
        _now("opened_at", "When it was opened."),
        sa.CheckConstraint(
            "attempt >= 1 AND num_ranks >= 1 AND epoch >= 0 AND step >= 0 AND position >= 0", name=op.f("ck_attempt_counted")
        ),
        sa.ForeignKeyConstraint(["run_id"], ["run.id"], name=op.f("fk_attempt_run_id_run")),
        sa.ForeignKeyConstraint(["stream_id"], ["stream.id"], name=op.f("fk_attempt_stream_id_stream")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_attempt")),
        sa.UniqueConstraint("run_id", "stream_id", "attempt", name=op.f("uq_attempt_run_id_stream_id_attempt")),
        comment="One uninterrupted stretch of a run. A later one that begins earlier replaces what came after its beginning.",
    )
    op.create_index(op.f("ix_attempt_stream_id"), "attempt", ["stream_id"])

    left = "When it left or was seen to be gone; NULL: it is fed, or its daemon died."
    op.create_table(
        "consumer",
        _id(),
        sa.Column("run_id", sa.BigInteger(), nullable=True, comment="The training; NULL until it asks for its first epoch."),
        sa.Column("stream_id", sa.BigInteger(), nullable=False, comment="What it is fed."),
        sa.Column("attempt", sa.Integer(), nullable=True, comment="Attempt of the run; NULL until it asks for its first epoch."),
        sa.Column("rank", sa.Integer(), nullable=False, comment="Its place among num_ranks, from 0."),
        sa.Column("num_ranks", sa.Integer(), nullable=False, comment="Training processes that share the batches."),
        sa.Column("host", sa.Text(), nullable=False, comment="Machine of the training process and its daemon."),
        sa.Column("pid", sa.Integer(), nullable=False, comment="Process, as the kernel says."),
        sa.Column("uid", sa.Integer(), nullable=False, comment="User, as the kernel says."),
        sa.Column("daemon_pid", sa.Integer(), nullable=False, comment="Process of the daemon."),
        sa.Column(
            "versions",
            JSONB(),
            server_default="{}",
            nullable=False,
            comment="What the training process runs on: package → version.",
        ),
        _now("attached_at", "When it attached."),
        sa.Column("left_at", sa.DateTime(timezone=True), nullable=True, comment=left),
        sa.Column("reason", sa.Text(), nullable=True, comment="Why it left; NULL: it said goodbye or was closed."),
        sa.Column("reserved_epoch", sa.Integer(), nullable=True, comment="Epoch of its last reservation."),
        sa.Column(
            "reserved_to",
            sa.BigInteger(),
            nullable=True,
            comment="All its positions of that epoch before this one have a row in the ledger.",
        ),
        sa.Column("ended_epoch", sa.Integer(), nullable=True, comment="Last epoch of which it got everything."),
        sa.CheckConstraint("rank >= 0 AND rank < num_ranks", name=op.f("ck_consumer_rank")),
        sa.CheckConstraint("(run_id IS NULL) = (attempt IS NULL)", name=op.f("ck_consumer_attempt_whole")),
        sa.CheckConstraint("(reserved_epoch IS NULL) = (reserved_to IS NULL)", name=op.f("ck_consumer_reserved_whole")),
        sa.ForeignKeyConstraint(["run_id"], ["run.id"], name=op.f("fk_consumer_run_id_run")),
        sa.ForeignKeyConstraint(["stream_id"], ["stream.id"], name=op.f("fk_consumer_stream_id_stream")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_consumer")),
        comment="Who attached to a daemon: one row an attach. While it is fed, its daemon holds an advisory lock on its id.",
    )
    op.create_index("ix_consumer_attempt", "consumer", ["run_id", "stream_id", "attempt", "rank"])
    op.create_index(op.f("ix_consumer_stream_id"), "consumer", ["stream_id"])

    pruned = "When its order and ledger rows were dropped; summary and patients stay."
    op.add_column("epoch", sa.Column("pruned_at", sa.DateTime(timezone=True), comment=pruned))
    op.add_column("epoch", sa.Column("summary", JSONB(), comment="Its row of epoch_coverage when it was pruned."))
    patients = "patient.id of everybody of whom it delivered something, when it was pruned."
    op.add_column("epoch", sa.Column("patients", sa.ARRAY(sa.BigInteger()), comment=patients))
    op.create_check_constraint(op.f("ck_epoch_pruned_whole"), "epoch", "num_nonnulls(pruned_at, summary, patients) IN (0, 3)")

    op.drop_constraint("uq_ledger_epoch_id_attempt_outcome_positions", "ledger")
    rank = "Its place among the ranks of the attempt."
    op.add_column("ledger", sa.Column("rank", sa.Integer(), server_default="0", nullable=False, comment=rank))
    op.create_index("ix_ledger_epoch_id", "ledger", ["epoch_id", "attempt", "rank"])

    revokes = "While it is open nothing of its subject is fed: at once, from frozen streams too, and what is ingested later as well."
    op.add_column("flag", sa.Column("revokes", sa.Boolean(), server_default="false", nullable=False, comment=revokes))
    op.create_index("ix_flag_revokes", "flag", ["id"], postgresql_where=sa.text("revokes AND state = 'open'"))
    op.create_check_constraint(op.f("ck_flag_revokes_error"), "flag", "NOT revokes OR severity = 'error'")

    for statement in CARRY_OVER.split(";"):
        op.execute(statement)
    op.execute("DROP VIEW epoch_coverage")
    for text in (LEDGER_EFFECTIVE, EPOCH_COVERAGE, SAMPLE_HISTORY, RUN_PROVENANCE, REVOKED_IMAGE):
        op.execute(text)
    for name, comment in COMMENTS.items():
        op.execute(f"COMMENT ON VIEW {name} IS '{comment}'")
    op.execute(NOTIFY)


def downgrade() -> None:
    raise RuntimeError("attempts and consumers have no place in the schema before: restore a dump instead")
