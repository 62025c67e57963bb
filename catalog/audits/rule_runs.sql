-- title: What each rule found when it last ran
-- means: One row a rule of `catalog qa run`: when it last ran, what it found, and what it could not look at. A rule that is not here never
--   ran; one that left subjects out says nothing about these.
-- must be empty: no
-- column rule: Code of the rule.
-- column rule_version: Its version then.
-- column qa_run: The run.
-- column at: When that run began.
-- column actor: Who ran it.
-- column changed_only: Did it look only at patients of whom something had changed?
-- column findings: Subjects that failed.
-- column raised: Flags that it raised.
-- column closed: Flags that closed themselves.
-- column not_evaluated: Subjects that it could not look at.
-- column why: Why not.
-- column settings: Parameters that are not at their defaults now.
SELECT DISTINCT ON (q.rule) q.rule, q.rule_version, u.id AS qa_run, u.started_at AS at, u.actor, u.changed_only, q.findings, q.raised,
       q.closed, q.not_evaluated, q.why,
       (SELECT string_agg(s.name || ' ' || s.value, ', ' ORDER BY s.name) FROM rule_setting s WHERE s.rule = q.rule) AS settings
FROM qa_result q JOIN qa_run u ON u.id = q.qa_run_id
ORDER BY q.rule, u.id DESC
