-- title: Findings that nobody has answered
-- means: One row an open flag. Those of severity error keep what they speak of out of feeding; those that revoke do so at once.
-- must be empty: no
-- column flag_id: The flag, as `catalog flag show` takes it.
-- column rule: Code of the rule that raised it.
-- column rule_version: Version of that rule.
-- column severity: error, warning or info.
-- column subject: file, image, annotation, pairing, series, study or patient.
-- column subject_id: Its id there.
-- column value: What was measured.
-- column detail: What was found, in words.
-- column revokes: Is nothing of it fed, not from frozen streams either?
-- column raised_by: Who raised it.
-- column raised_at: When.
-- column assigned_to: Who looks after it.
SELECT g.id AS flag_id, g.rule, g.rule_version, g.severity,
       CASE WHEN g.file_id IS NOT NULL THEN 'file' WHEN g.image_id IS NOT NULL THEN 'image' WHEN g.annotation_id IS NOT NULL THEN 'annotation'
            WHEN g.pairing_id IS NOT NULL THEN 'pairing' WHEN g.series_id IS NOT NULL THEN 'series' WHEN g.study_id IS NOT NULL THEN 'study'
            ELSE 'patient' END AS subject,
       coalesce(g.file_id, g.image_id, g.annotation_id, g.pairing_id, g.series_id, g.study_id, g.patient_id) AS subject_id,
       g.value, g.detail, g.revokes, g.raised_by, g.raised_at, g.assigned_to
FROM flag g WHERE g.state = 'open'
ORDER BY array_position(ARRAY['error', 'warning', 'info'], g.severity), g.rule, g.id
