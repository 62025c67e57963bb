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
-- column reads_private: Of schema private, where the paths and names of a pseudonymized catalog lie: all, nothing, or which tables.
-- column writes_private: Of the same schema, the tables that it may change.
WITH relation AS (
    SELECT c.oid, c.relname, c.relowner, c.relkind = 'r' AS is_table, n.oid AS schema, n.oid <> own.oid AS private
    FROM pg_namespace own
    JOIN pg_namespace n ON n.oid = own.oid
                        OR n.nspname = (CASE own.nspname WHEN 'public' THEN 'private' ELSE own.nspname || '_private' END)::name
    JOIN pg_class c ON c.relnamespace = n.oid
    WHERE own.oid = (SELECT relnamespace FROM pg_class WHERE oid = 'event'::regclass) AND c.relkind IN ('r', 'v')
), may AS (
    SELECT r.oid, r.rolname, r.rolcanlogin, r.rolsuper, c.relname, c.is_table, c.private, c.relowner = r.oid AS owned,
           has_schema_privilege(r.oid, c.schema, 'USAGE') AND has_table_privilege(r.oid, c.oid, 'SELECT') AS reads,
           has_schema_privilege(r.oid, c.schema, 'USAGE')
           AND (has_table_privilege(r.oid, c.oid, 'INSERT, DELETE, TRUNCATE') OR has_any_column_privilege(r.oid, c.oid, 'INSERT, UPDATE')) AS writes
    FROM pg_roles r CROSS JOIN relation c WHERE r.rolname !~ '^pg_'
)
SELECT m.rolname::text AS role, m.rolcanlogin AS may_log_in, m.rolsuper AS superuser,
       (SELECT string_agg(g.rolname, ', ' ORDER BY g.rolname) FROM pg_auth_members k JOIN pg_roles g ON g.oid = k.roleid
        WHERE k.member = m.oid) AS member_of,
       CASE WHEN bool_and(m.reads OR m.private) THEN 'all' WHEN NOT bool_or(m.reads AND NOT m.private) THEN 'nothing'
            WHEN count(*) FILTER (WHERE NOT m.reads AND NOT m.private) <= 3
            THEN 'all but ' || string_agg(m.relname, ', ' ORDER BY m.relname) FILTER (WHERE NOT m.reads AND NOT m.private)
            ELSE string_agg(m.relname, ', ' ORDER BY m.relname) FILTER (WHERE m.reads AND NOT m.private) END AS reads,
       CASE WHEN bool_and(m.writes) FILTER (WHERE m.is_table AND NOT m.private) THEN 'all'
            WHEN NOT bool_or(m.writes AND NOT m.private) THEN 'nothing'
            WHEN count(*) FILTER (WHERE m.is_table AND NOT m.writes AND NOT m.private) <= 3
            THEN 'all but ' || string_agg(m.relname, ', ' ORDER BY m.relname) FILTER (WHERE m.is_table AND NOT m.writes AND NOT m.private)
            ELSE string_agg(m.relname, ', ' ORDER BY m.relname) FILTER (WHERE m.writes AND NOT m.private) END AS writes,
       count(*) FILTER (WHERE m.owned) AS owns,
       CASE WHEN bool_and(m.reads) FILTER (WHERE m.private) THEN 'all'
            ELSE coalesce(string_agg(m.relname, ', ' ORDER BY m.relname) FILTER (WHERE m.private AND m.reads), 'nothing') END AS reads_private,
       CASE WHEN bool_and(m.writes) FILTER (WHERE m.private) THEN 'all'
            ELSE coalesce(string_agg(m.relname, ', ' ORDER BY m.relname) FILTER (WHERE m.private AND m.writes), 'nothing') END AS writes_private
FROM may m
GROUP BY m.oid, m.rolname, m.rolcanlogin, m.rolsuper HAVING bool_or(m.reads OR m.writes)
ORDER BY m.rolsuper DESC, m.rolname
