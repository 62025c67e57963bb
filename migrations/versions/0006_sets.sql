CREATE VIEW split_balance AS
SELECT s.name AS split, sp.part, sp.fold, count(*) AS patients,
       round(count(sp.part) / nullif(sum(count(sp.part)) OVER (PARTITION BY s.id), 0)::numeric, 4) AS share,
       s.ratios[array_position(s.parts, sp.part)] AS wanted,
       coalesce(sum(c.images), 0)::bigint AS images, coalesce(sum(c.annotated), 0)::bigint AS annotated, s.frozen_at IS NOT NULL AS frozen
FROM split s CROSS JOIN patient pt LEFT JOIN split_patient sp ON (sp.split_id, sp.patient_id) = (s.id, pt.id)
LEFT JOIN (
    SELECT st.patient_id, count(*) AS images, count(d.image_id) AS annotated
    FROM image i JOIN instance n ON n.id = i.instance_id JOIN series se ON se.id = n.series_id JOIN study st ON st.id = se.study_id
    LEFT JOIN (SELECT DISTINCT p.image_id FROM pairing p JOIN annotation a ON a.id = p.annotation_id
               WHERE p.state = 'accepted' AND a.current) d ON d.image_id = i.id
    GROUP BY st.patient_id
) c ON c.patient_id = pt.id
GROUP BY s.id, sp.part, sp.fold
ORDER BY s.name, array_position(s.parts, sp.part), sp.fold;

COMMENT ON VIEW split_balance IS 'What the parts of each split hold. How patients, images and samples are dealt out, beside the share that was asked for. A part without patients has no row.';

COMMENT ON COLUMN split_balance.split IS 'Its name.';

COMMENT ON COLUMN split_balance.part IS 'Part; NULL: patients who came since and have none (`catalog split extend`).';

COMMENT ON COLUMN split_balance.fold IS 'Fold, from 0; NULL: none.';

COMMENT ON COLUMN split_balance.patients IS 'Patients.';

COMMENT ON COLUMN split_balance.share IS 'Of the split''s patients, those in this part and fold.';

COMMENT ON COLUMN split_balance.wanted IS 'Share of the part that was asked for; NULL: imported.';

COMMENT ON COLUMN split_balance.images IS 'Images of these patients.';

COMMENT ON COLUMN split_balance.annotated IS 'Those that have an accepted annotation.';

COMMENT ON COLUMN split_balance.frozen IS 'Is the split frozen?';

CREATE VIEW split_leaks AS
WITH held AS (
    SELECT i.id AS sample_id, i.pixel_hash, a.split_id, a.patient_id, a.part, a.fold,
           bool_or(m.image_id IS NOT NULL) OVER (PARTITION BY i.pixel_hash) AS blank
    FROM image i JOIN instance n ON n.id = i.instance_id JOIN series se ON se.id = n.series_id JOIN study st ON st.id = se.study_id
    JOIN split_patient a ON a.patient_id = st.patient_id
    LEFT JOIN measure m ON m.image_id = i.id AND m.minimum = m.maximum
    WHERE i.pixel_hash IN (
        SELECT i.pixel_hash FROM image i JOIN instance n ON n.id = i.instance_id JOIN series se ON se.id = n.series_id
        JOIN study st ON st.id = se.study_id WHERE i.pixel_hash IS NOT NULL
        GROUP BY i.pixel_hash HAVING min(st.patient_id) <> max(st.patient_id))
), sides AS (
    SELECT split_id, pixel_hash, part, fold, min(sample_id) AS sample_id FROM held WHERE NOT blank GROUP BY split_id, pixel_hash, part, fold
)
SELECT DISTINCT ON (s.name, h.sample_id) s.name AS split, h.sample_id, pt.patient_id AS patient, h.part, h.fold,
       o.sample_id AS other_sample_id, o.part AS other_part, o.fold AS other_fold
FROM held h JOIN sides o ON (o.split_id, o.pixel_hash) = (h.split_id, h.pixel_hash) AND (o.part, o.fold) IS DISTINCT FROM (h.part, h.fold)
JOIN split s ON s.id = h.split_id JOIN patient pt ON pt.id = h.patient_id
ORDER BY s.name, h.sample_id, o.sample_id;

COMMENT ON VIEW split_leaks IS 'Pixels on two sides of a split: must be empty. Images whose pixels a patient on another side of the split has too. The database refuses such a split; these came in later, with an ingest or when hashes were measured. They are fed to no part of the split until one of them is gone.';

COMMENT ON COLUMN split_leaks.split IS 'Its name.';

COMMENT ON COLUMN split_leaks.sample_id IS 'The image.';

COMMENT ON COLUMN split_leaks.patient IS 'Its patient.';

COMMENT ON COLUMN split_leaks.part IS 'Its part.';

COMMENT ON COLUMN split_leaks.fold IS 'And fold.';

COMMENT ON COLUMN split_leaks.other_sample_id IS 'An image (of several the first) of the same pixels on another side.';

COMMENT ON COLUMN split_leaks.other_part IS 'Its part.';

COMMENT ON COLUMN split_leaks.other_fold IS 'And fold.';

CREATE VIEW derived_labels AS
SELECT d.annotation_id, p.image_id AS sample_id, pt.patient_id AS patient, s.name AS structure, a.origin, d.method, d.along, d.gap,
       d.fraction, d.first_id, d.second_id, p.state, a.current, m.area_px, d.actor, d.at
FROM derivation d JOIN annotation a ON a.id = d.annotation_id JOIN structure s ON s.id = a.structure_id
JOIN pairing p ON p.annotation_id = a.id JOIN image i ON i.id = p.image_id JOIN instance n ON n.id = i.instance_id
JOIN series se ON se.id = n.series_id JOIN study st ON st.id = se.study_id JOIN patient pt ON pt.id = st.patient_id
LEFT JOIN mask m ON m.pairing_id = p.id
ORDER BY d.annotation_id;

COMMENT ON VIEW derived_labels IS 'Labels that nobody drew. What was interpolated between drawn labels, or proposed from intensities, and from what. It is fed only where it is asked for.';

COMMENT ON COLUMN derived_labels.annotation_id IS 'The derived annotation.';

COMMENT ON COLUMN derived_labels.sample_id IS 'Its image.';

COMMENT ON COLUMN derived_labels.patient IS 'The patient.';

COMMENT ON COLUMN derived_labels.structure IS 'What it shows.';

COMMENT ON COLUMN derived_labels.origin IS 'interpolated or proposed.';

COMMENT ON COLUMN derived_labels.method IS 'How it was made.';

COMMENT ON COLUMN derived_labels.along IS 'slices or phases; NULL: proposed.';

COMMENT ON COLUMN derived_labels.gap IS 'From the first parent to the second: mm, or ms.';

COMMENT ON COLUMN derived_labels.fraction IS 'Where between them it lies, 0 to 1.';

COMMENT ON COLUMN derived_labels.first_id IS 'Annotation that it was made from.';

COMMENT ON COLUMN derived_labels.second_id IS 'The other one.';

COMMENT ON COLUMN derived_labels.state IS 'accepted, proposed or rejected; rejected too if a parent was.';

COMMENT ON COLUMN derived_labels.current IS 'Is it the newest version?';

COMMENT ON COLUMN derived_labels.area_px IS 'Pixels in the mask.';

COMMENT ON COLUMN derived_labels.actor IS 'Who asked for it.';

COMMENT ON COLUMN derived_labels.at IS 'When.';

CREATE VIEW snapshot_contents AS
SELECT s.name AS snapshot, encode(s.sha256, 'hex') AS sha256, s.created_at, s.actor, s.num_samples AS samples, s.num_patients AS patients,
       count(*) FILTER (WHERE k.erasure_id IS NOT NULL) AS erased, count(r.sample_id) AS revoked, count(f.number) AS flagged
FROM snapshot s JOIN snapshot_sample k ON k.snapshot_id = s.id
LEFT JOIN revoked_image r ON r.sample_id = k.image_id
LEFT JOIN (
    SELECT m.snapshot_id, m.number FROM flag g JOIN snapshot_mask m ON m.pairing_id = g.pairing_id
    WHERE g.state = 'open' AND g.severity = 'error'
    UNION
    SELECT m.snapshot_id, m.number FROM flag g JOIN pairing q ON q.annotation_id = g.annotation_id
    JOIN snapshot_mask m ON m.pairing_id = q.id WHERE g.state = 'open' AND g.severity = 'error'
    UNION
    SELECT k.snapshot_id, k.number FROM snapshot_sample k JOIN image_all i ON i.sample_id = k.image_id WHERE i.error_flags > 0
) f ON (f.snapshot_id, f.number) = (k.snapshot_id, k.number)
GROUP BY s.id
ORDER BY s.id;

COMMENT ON VIEW snapshot_contents IS 'What snapshots hold. Frozen lists of samples, with what became of them since: erased patients, withdrawn consent, flags raised later.';

COMMENT ON COLUMN snapshot_contents.snapshot IS 'Its name.';

COMMENT ON COLUMN snapshot_contents.sha256 IS 'Digest of its content.';

COMMENT ON COLUMN snapshot_contents.created_at IS 'When it was made.';

COMMENT ON COLUMN snapshot_contents.actor IS 'By whom.';

COMMENT ON COLUMN snapshot_contents.samples IS 'Samples when it was made.';

COMMENT ON COLUMN snapshot_contents.patients IS 'Patients when it was made.';

COMMENT ON COLUMN snapshot_contents.erased IS 'Samples of patients who were erased since.';

COMMENT ON COLUMN snapshot_contents.revoked IS 'Samples that are not fed any more, since consent was withdrawn or a flag revokes them.';

COMMENT ON COLUMN snapshot_contents.flagged IS 'Samples with an open error now: a stream on the snapshot feeds them all the same.';
