"""What a stream looked up once: the classes of its labels and the statistics of its images, which then stay. An index on labels."""

from alembic import op

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None

# As in 0006, and with what the stream looked up.
RUN_PROVENANCE = """
CREATE OR REPLACE VIEW run_provenance AS
SELECT r.name AS run, f.stream_id AS stream, s.name AS stream_name, encode(s.digest, 'hex') AS stream_sha256, s.definition,
       (SELECT encode(k.sha256, 'hex') FROM snapshot k WHERE k.name = s.definition->>'snapshot') AS snapshot_sha256, coalesce(s.definition->'transforms', '[]'::jsonb) AS transforms,
       (SELECT array_agg(encode(e.order_sha256, 'hex') ORDER BY e.epoch) FROM epoch e
        WHERE e.run_id = r.id AND e.stream_id = s.id AND e.started_at IS NOT NULL) AS order_sha256s,
       (SELECT count(*) FROM attempt t WHERE t.run_id = r.id AND t.stream_id = s.id) AS attempts,
       (SELECT jsonb_agg(DISTINCT t.versions) FROM attempt t WHERE t.run_id = r.id AND t.stream_id = s.id) AS daemon_versions,
       (SELECT jsonb_agg(DISTINCT c.versions) FROM consumer c WHERE c.run_id = r.id AND c.stream_id = s.id) AS trainer_versions,
       (SELECT array_agg(DISTINCT c.host || ':' || c.pid || ' rank ' || c.rank || ' of ' || c.num_ranks) FROM consumer c
        WHERE c.run_id = r.id AND c.stream_id = s.id) AS consumers,
       (SELECT array_agg(encode(n.model_sha256, 'hex') ORDER BY n.id) FROM run_note n
        WHERE n.run_id = r.id AND n.model_sha256 IS NOT NULL) AS models,
       r.program_version, r.host, r.created_at, s.constants
FROM run r
JOIN (SELECT run_id, stream_id FROM attempt UNION SELECT run_id, stream_id FROM epoch) f ON f.run_id = r.id
JOIN stream s ON s.id = f.stream_id
"""


def upgrade() -> None:
    op.execute("ALTER TABLE stream ADD COLUMN constants JSONB")
    op.execute(
        "COMMENT ON COLUMN stream.constants IS "
        "'Looked up when it was first asked for, and kept: classes of labels, statistics of images. NULL: nothing was needed.'"
    )
    op.execute(RUN_PROVENANCE)
    op.execute("CREATE INDEX ix_annotation_label ON annotation (label, structure_id) WHERE current AND kind = 'label'")


def downgrade() -> None:
    raise RuntimeError("runs name these constants: restore a dump instead")
