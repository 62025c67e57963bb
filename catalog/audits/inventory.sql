-- title: What is there
-- means: One row a storage place and modality: how many patients, images and annotations, and how much of it cannot be read now.
-- must be empty: no
-- column root: Name of the storage place.
-- column modality: Modality (0008,0060).
-- column patients: Patients of whom it holds images.
-- column studies: Their studies.
-- column series: Their series.
-- column images: 2-D frames.
-- column sizes: Rows × columns in px, the most frequent first.
-- column annotated: Images with an accepted current annotation.
-- column annotations: Accepted current annotations on these images.
-- column structures: What was drawn on them.
-- column not_present: Images of which no file is present.
-- column files: Files that hold these images.
-- column bytes: Their size together, as catalogued.
WITH held AS (
    SELECT DISTINCT f.root_id, l.image_id FROM location l JOIN file f ON f.id = l.file_id
), drawn AS (
    SELECT p.image_id, count(*) AS annotations, array_agg(DISTINCT s.name) AS structures
    FROM pairing p JOIN annotation a ON a.id = p.annotation_id AND a.current JOIN structure s ON s.id = a.structure_id
    WHERE p.state = 'accepted' GROUP BY p.image_id
), here AS (
    SELECT h.root_id, se.modality, st.patient_id, se.study_id, n.series_id, i.id, i.rows || '×' || i.columns AS size, d.annotations, d.structures,
           EXISTS (SELECT FROM location l JOIN file f ON f.id = l.file_id WHERE l.image_id = i.id AND f.state = 'present') AS present
    FROM held h JOIN image i ON i.id = h.image_id JOIN instance n ON n.id = i.instance_id
    JOIN series se ON se.id = n.series_id JOIN study st ON st.id = se.study_id
    LEFT JOIN drawn d ON d.image_id = i.id
), files AS (
    SELECT root_id, modality, count(*) AS files, sum(size)::bigint AS bytes FROM (
        SELECT DISTINCT f.root_id, se.modality, f.id, f.size FROM location l JOIN file f ON f.id = l.file_id
        JOIN image i ON i.id = l.image_id JOIN instance n ON n.id = i.instance_id JOIN series se ON se.id = n.series_id
    ) AS once GROUP BY root_id, modality
)
SELECT r.name AS root, h.modality, count(DISTINCT h.patient_id) AS patients, count(DISTINCT h.study_id) AS studies,
       count(DISTINCT h.series_id) AS series, count(*) AS images,
       (SELECT string_agg(size, ', ' ORDER BY count DESC, size)
        FROM (SELECT size, count(*) FROM here x WHERE (x.root_id, x.modality) = (h.root_id, h.modality) GROUP BY size) AS sizes) AS sizes,
       count(h.annotations) AS annotated, coalesce(sum(h.annotations), 0)::bigint AS annotations,
       (SELECT string_agg(DISTINCT name, ', ') FROM here x CROSS JOIN unnest(x.structures) AS name
        WHERE (x.root_id, x.modality) = (h.root_id, h.modality)) AS structures,
       count(*) FILTER (WHERE NOT h.present) AS not_present, f.files, f.bytes
FROM here h JOIN root r ON r.id = h.root_id JOIN files f ON (f.root_id, f.modality) = (h.root_id, h.modality)
GROUP BY h.root_id, h.modality, r.name, f.files, f.bytes
ORDER BY r.name, h.modality
