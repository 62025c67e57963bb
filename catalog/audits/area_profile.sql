-- title: Areas along slices and phases
-- means: One row an accepted current annotation with a mask, slice by slice along the normal within one phase; change says by which share
--   the area differs from the slice before it. Contours that belong to another slice show as a jump there and back.
-- must be empty: no
-- column patient: PatientID, or the layout's name for the patient.
-- column series_id: The series.
-- column structure: What was drawn.
-- column reader: Who drew it.
-- column phase: Rank of the trigger time, from 0.
-- column trigger_time: TriggerTime in ms.
-- column position: mm along the slice normal, to 0.01.
-- column sample_id: The image.
-- column annotation_id: The annotation.
-- column area_px: Pixels in the mask.
-- column area_mm2: The same in mm².
-- column change: Area less that of the slice before it, as a share of that; NULL for a first one.
SELECT pt.patient_id AS patient, n.series_id, s.name AS structure, r.name AS reader, i.phase, i.trigger_time,
       round(i.position::numeric, 2)::float8 AS position, i.id AS sample_id, a.id AS annotation_id, m.area_px,
       round((m.area_px * i.row_spacing * i.column_spacing)::numeric, 2)::float8 AS area_mm2,
       round(m.area_px::numeric / nullif(lag(m.area_px) OVER along, 0) - 1, 4)::float8 AS change
FROM pairing p JOIN annotation a ON a.id = p.annotation_id AND a.current JOIN mask m ON m.pairing_id = p.id
JOIN structure s ON s.id = a.structure_id JOIN reader r ON r.id = a.reader_id
JOIN image i ON i.id = p.image_id JOIN instance n ON n.id = i.instance_id JOIN series se ON se.id = n.series_id
JOIN study st ON st.id = se.study_id JOIN patient pt ON pt.id = st.patient_id
WHERE p.state = 'accepted'
WINDOW along AS (PARTITION BY n.series_id, a.structure_id, a.reader_id, i.phase ORDER BY i.position, i.id)
ORDER BY pt.patient_id, n.series_id, s.name, r.name, i.phase, position, i.id
