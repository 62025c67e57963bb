-- title: Guards of the schema that are off
-- means: Triggers that are disabled or gone, constraints that were not checked, indexes that cannot be used, rules or row-level security
--   that would hide or swallow rows. While one is off, the database does not hold what the other audits take for granted.
-- must be empty: yes
-- column what: What kind of guard.
-- column relation: On which table.
-- column name: Its name.
-- column state: What is wrong with it.
WITH here AS (
    SELECT c.oid, c.relname FROM pg_class c
    WHERE c.relnamespace = (SELECT relnamespace FROM pg_class WHERE oid = 'event'::regclass) AND c.relname <> 'alembic_version'
), needed (relation, name, needs) AS (
    SELECT t, 'note_change', 'INSERT INTO catalog_change'
    FROM unnest(ARRAY['root', 'file', 'patient', 'study', 'series', 'instance', 'image', 'location', 'reader', 'structure', 'annotation',
                      'pairing', 'mask', 'flag']) AS t
    UNION ALL SELECT t, 'record_' || what, 'INSERT INTO event'
    FROM unnest(ARRAY['flag', 'pairing', 'annotation', 'relation', 'rule_setting']) AS t, unnest(ARRAY['insert', 'update', 'delete']) AS what
    UNION ALL SELECT t, 'touch_' || what, 'INSERT INTO touched'
    FROM unnest(ARRAY['instance', 'measure', 'pairing', 'shape', 'edge_fit']) AS t, unnest(ARRAY['insert', 'update', 'delete']) AS what
    UNION ALL SELECT t, 'touch_' || what, 'INSERT INTO touched'
    FROM (VALUES ('location', 'update'), ('location', 'delete'), ('file', 'update'), ('annotation', 'update'), ('image', 'insert'),
                 ('image', 'update')) AS o (t, what)
    UNION ALL VALUES ('event', 'refuse_change', 'RAISE EXCEPTION'), ('flag', 'notify_daemons', 'pg_notify'),
                     ('flag', 'notify_daemons_of_changes', 'pg_notify'), ('stream', 'notify_daemons', 'pg_notify')
)
SELECT 'trigger' AS what, n.relation, n.name,
       CASE WHEN g.oid IS NULL THEN 'is not there' ELSE 'its function does not do its work' END AS state
FROM needed n LEFT JOIN here h ON h.relname = n.relation LEFT JOIN pg_trigger g ON g.tgrelid = h.oid AND g.tgname = n.name
LEFT JOIN pg_proc f ON f.oid = g.tgfoid
WHERE g.oid IS NULL OR strpos(f.prosrc, n.needs) = 0
UNION ALL
SELECT CASE WHEN g.tgisinternal THEN 'constraint trigger' ELSE 'trigger' END, h.relname, g.tgname,
       CASE g.tgenabled WHEN 'D' THEN 'is disabled' ELSE 'fires on replicas alone' END
FROM pg_trigger g JOIN here h ON h.oid = g.tgrelid WHERE g.tgenabled NOT IN ('O', 'A')
UNION ALL
SELECT 'constraint', h.relname, c.conname, CASE WHEN c.convalidated THEN 'is not enforced' ELSE 'was not checked on the rows there' END
FROM pg_constraint c JOIN here h ON h.oid = c.conrelid
WHERE NOT c.convalidated OR to_jsonb(c)->>'conenforced' = 'false'
UNION ALL
SELECT 'index', h.relname, x.relname, 'is not valid'
FROM pg_index i JOIN here h ON h.oid = i.indrelid JOIN pg_class x ON x.oid = i.indexrelid WHERE NOT (i.indisvalid AND i.indisready AND i.indislive)
UNION ALL
SELECT 'row-level security', h.relname, coalesce(p.polname, h.relname), 'may show fewer rows without saying so'
FROM here h JOIN pg_class c ON c.oid = h.oid LEFT JOIN pg_policy p ON p.polrelid = h.oid WHERE c.relrowsecurity OR p.oid IS NOT NULL
UNION ALL
SELECT 'rule', h.relname, w.rulename, 'changes what statements on the table do'
FROM pg_rewrite w JOIN here h ON h.oid = w.ev_class WHERE w.rulename <> '_RETURN'
ORDER BY what, relation, name
