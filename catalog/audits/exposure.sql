-- title: Who may read what, and who may change it
-- means: One row a role of the server that may read or write something of this catalog, with what it inherits from the roles it is a
--   member of. A superuser may do everything, the triggers that guard the event log included.
-- must be empty: no
-- column role: The role.
-- column may_log_in: Is it a login?
-- column superuser: May it do everything?
-- column member_of: Roles whose rights it has.
-- column reads: What it may read: all, all but a few, or which tables and views.
-- column writes: Tables of which it may add, change or delete rows, or some columns: all, all but a few, or which.
-- column owns: How many tables and views it owns; an owner may alter them.
WITH relation AS (
    SELECT c.oid, c.relname, c.relowner, c.relkind = 'r' AS is_table FROM pg_class c
    WHERE c.relkind IN ('r', 'v') AND c.relnamespace = (SELECT relnamespace FROM pg_class WHERE oid = 'event'::regclass)
), may AS (
    SELECT r.oid, r.rolname, r.rolcanlogin, r.rolsuper, c.relname, c.is_table, c.relowner = r.oid AS owned,
           has_table_privilege(r.oid, c.oid, 'SELECT') AS reads,
           has_table_privilege(r.oid, c.oid, 'INSERT, DELETE, TRUNCATE') OR has_any_column_privilege(r.oid, c.oid, 'INSERT, UPDATE') AS writes
    FROM pg_roles r CROSS JOIN relation c WHERE r.rolname !~ '^pg_'
)
SELECT m.rolname::text AS role, m.rolcanlogin AS may_log_in, m.rolsuper AS superuser,
       (SELECT string_agg(g.rolname, ', ' ORDER BY g.rolname) FROM pg_auth_members k JOIN pg_roles g ON g.oid = k.roleid
        WHERE k.member = m.oid) AS member_of,
       CASE WHEN bool_and(m.reads) THEN 'all' WHEN NOT bool_or(m.reads) THEN 'nothing'
            WHEN count(*) FILTER (WHERE NOT m.reads) <= 3 THEN 'all but ' || string_agg(m.relname, ', ' ORDER BY m.relname) FILTER (WHERE NOT m.reads)
            ELSE string_agg(m.relname, ', ' ORDER BY m.relname) FILTER (WHERE m.reads) END AS reads,
       CASE WHEN bool_and(m.writes) FILTER (WHERE m.is_table) THEN 'all' WHEN NOT bool_or(m.writes) THEN 'nothing'
            WHEN count(*) FILTER (WHERE m.is_table AND NOT m.writes) <= 3
            THEN 'all but ' || string_agg(m.relname, ', ' ORDER BY m.relname) FILTER (WHERE m.is_table AND NOT m.writes)
            ELSE string_agg(m.relname, ', ' ORDER BY m.relname) FILTER (WHERE m.writes) END AS writes,
       count(*) FILTER (WHERE m.owned) AS owns
FROM may m
GROUP BY m.oid, m.rolname, m.rolcanlogin, m.rolsuper HAVING bool_or(m.reads OR m.writes)
ORDER BY m.rolsuper DESC, m.rolname
