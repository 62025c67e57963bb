-- title: Which patients a training saw
-- means: One row a training and patient: of how many samples pixels were delivered, in how many epochs, and which models came of it. Of
--   pruned epochs the patients are known and the samples no more.
-- must be empty: no
-- column run: The training.
-- column patient: PatientID, or the layout's name for the patient; NULL: the images were taken out since.
-- column samples: Different images delivered, in epochs that are not pruned.
-- column epochs: Epochs in which some of them were.
-- column first_at: When the first of these epochs began.
-- column last_at: When the last of them began.
-- column revoked: Is something of the patient revoked now?
-- column models: sha256 of models that this training made.
WITH given AS (
    SELECT epoch_id, range_agg(positions) AS positions FROM ledger WHERE outcome = 'delivered' GROUP BY epoch_id
), seen AS (
    SELECT e.run_id, e.id AS epoch_id, e.started_at, st.patient_id, s.sample_id
    FROM epoch e JOIN given g ON g.epoch_id = e.id JOIN epoch_order o ON o.epoch_id = e.id
    CROSS JOIN LATERAL unnest(o.sample_ids) WITH ORDINALITY AS s (sample_id, n)
    LEFT JOIN image i ON i.id = s.sample_id LEFT JOIN instance n ON n.id = i.instance_id
    LEFT JOIN series se ON se.id = n.series_id LEFT JOIN study st ON st.id = se.study_id
    WHERE e.pruned_at IS NULL AND o.part * 1024 + s.n - 1 <@ g.positions
    UNION ALL
    SELECT e.run_id, e.id, e.started_at, pt.id, NULL FROM epoch e CROSS JOIN unnest(e.patients) AS pt (id) WHERE e.pruned_at IS NOT NULL
), revoked AS (
    SELECT DISTINCT st.patient_id FROM revoked_image v JOIN image i ON i.id = v.sample_id JOIN instance n ON n.id = i.instance_id
    JOIN series se ON se.id = n.series_id JOIN study st ON st.id = se.study_id
)
SELECT r.name AS run, pt.patient_id AS patient, count(DISTINCT s.sample_id) AS samples, count(DISTINCT s.epoch_id) AS epochs,
       min(s.started_at) AS first_at, max(s.started_at) AS last_at, bool_or(v.patient_id IS NOT NULL) AS revoked,
       (SELECT string_agg(DISTINCT encode(k.model_sha256, 'hex'), ', ') FROM run_note k WHERE k.run_id = r.id) AS models
FROM seen s JOIN run r ON r.id = s.run_id LEFT JOIN patient pt ON pt.id = s.patient_id LEFT JOIN revoked v ON v.patient_id = s.patient_id
GROUP BY r.id, r.name, pt.patient_id
ORDER BY r.name, pt.patient_id
