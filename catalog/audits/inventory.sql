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
-- column not_present: Images of which no file is present there.
-- column files: Files that hold these images.
-- column bytes: Their size together, as catalogued.
WITH held AS (
    SELECT f.root_id, l.image_id, bool_or(f.state = 'present') AS present FROM location l JOIN file f ON f.id = l.file_id
    GROUP BY f.root_id, l.image_id
), drawn AS (
    SELECT p.image_id, count(*) AS annotations FROM pairing p JOIN annotation a ON a.id = p.annotation_id AND a.current
    WHERE p.state = 'accepted' GROUP BY p.image_id
), counted AS (
    SELECT h.root_id, n.series_id, i.rows, i.columns, count(*) AS images, count(d.annotations) AS annotated, sum(d.annotations) AS annotations,
           count(*) FILTER (WHERE NOT h.present) AS not_present
    FROM held h JOIN image i ON i.id = h.image_id JOIN instance n ON n.id = i.instance_id LEFT JOIN drawn d ON d.image_id = i.id
    GROUP BY h.root_id, n.series_id, i.rows, i.columns
), known AS MATERIALIZED (
    SELECT c.*, se.modality, se.study_id, st.patient_id
    FROM counted c JOIN series se ON se.id = c.series_id JOIN study st ON st.id = se.study_id
), sizes AS (
    SELECT root_id, modality, string_agg(rows || '×' || columns, ', ' ORDER BY images DESC, rows, columns) AS sizes
    FROM (SELECT root_id, modality, rows, columns, sum(images) AS images FROM known GROUP BY root_id, modality, rows, columns) AS each
    GROUP BY root_id, modality
), structures AS (
    SELECT o.root_id, se.modality, string_agg(DISTINCT s.name, ', ') AS structures
    FROM (SELECT DISTINCT h.root_id, n.series_id, a.structure_id
          FROM pairing p JOIN annotation a ON a.id = p.annotation_id AND a.current JOIN held h ON h.image_id = p.image_id
          JOIN image i ON i.id = p.image_id JOIN instance n ON n.id = i.instance_id WHERE p.state = 'accepted') AS o
    JOIN structure s ON s.id = o.structure_id JOIN series se ON se.id = o.series_id GROUP BY o.root_id, se.modality
), files AS (
    SELECT f.root_id, se.modality, count(*) AS files, sum(f.size)::bigint AS bytes
    FROM (SELECT file_id, min(image_id) AS image_id FROM location GROUP BY file_id) AS o JOIN file f ON f.id = o.file_id
    JOIN image i ON i.id = o.image_id JOIN instance n ON n.id = i.instance_id JOIN series se ON se.id = n.series_id
    GROUP BY f.root_id, se.modality
)
SELECT r.name AS root, k.modality, count(DISTINCT k.patient_id) AS patients, count(DISTINCT k.study_id) AS studies,
       count(DISTINCT k.series_id) AS series, sum(k.images)::bigint AS images, z.sizes, sum(k.annotated)::bigint AS annotated,
       coalesce(sum(k.annotations), 0)::bigint AS annotations, t.structures, sum(k.not_present)::bigint AS not_present, f.files, f.bytes
FROM known k JOIN root r ON r.id = k.root_id JOIN sizes z ON z.root_id = k.root_id AND z.modality = k.modality
LEFT JOIN structures t ON t.root_id = k.root_id AND t.modality = k.modality
LEFT JOIN files f ON f.root_id = k.root_id AND f.modality = k.modality
GROUP BY r.id, r.name, k.modality, z.sizes, t.structures, f.files, f.bytes
ORDER BY r.name, k.modality
