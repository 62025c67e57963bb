-- title: What was decided about flags
-- means: One row a change of a flag, from the event log: who raised, closed, reopened or gave it to whom, when and why. Flags that were
--   raised before the log began (version 0004) have rows from then on.
-- must be empty: no
-- column flag_id: The flag; it may be gone.
-- column rule: Code of the rule.
-- column at: When.
-- column actor: Who, as the program was told.
-- column login: Login of the database under which it was done.
-- column action: insert, update or delete.
-- column state_before: State before.
-- column state_after: State after.
-- column severity: Severity after, or before it was deleted.
-- column value_before: What was measured, before.
-- column value_after: What was measured, after.
-- column assigned_to: Who looks after it.
-- column reason: Why, in words.
SELECT e.subject_id AS flag_id, coalesce(e.after, e.before)->>'rule' AS rule, e.at, e.actor, e.login, e.action,
       e.before->>'state' AS state_before, e.after->>'state' AS state_after, coalesce(e.after, e.before)->>'severity' AS severity,
       (e.before->>'value')::float8 AS value_before, (e.after->>'value')::float8 AS value_after, e.after->>'assigned_to' AS assigned_to, e.reason
FROM event e WHERE e.subject = 'flag'
ORDER BY e.subject_id, e.id
