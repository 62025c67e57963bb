-- title: What the parts of each split hold
-- means: How patients, images and samples are dealt out, beside the share that was asked for. A part without patients has no row.
-- must be empty: no
-- column split: Its name.
-- column part: Part; NULL: patients who came since and have none (`catalog split extend`).
-- column fold: Fold, from 0; NULL: none.
-- column patients: Patients.
-- column share: Of the split's patients, those in this part and fold.
-- column wanted: Share of the part that was asked for; NULL: imported.
-- column images: Images of these patients.
-- column annotated: Those that have an accepted annotation.
-- column frozen: Is the split frozen?
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
ORDER BY s.name, array_position(s.parts, sp.part), sp.fold
