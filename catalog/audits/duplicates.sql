-- title: What is there more than once
-- means: One row a content that several images, files or objects have. The same pixels under two patients leak from one split into
--   another; one SOPInstanceUID with several contents means that somebody wrote a file anew and kept its name.
-- must be empty: no
-- column what: pixels (images with equal stored values), file (files with equal bytes) or uid (objects of one UID that differ).
-- column content: sha256 of what is equal, as hex; for uid the UID.
-- column count: How many have it.
-- column patients: Under how many patients they are; NULL for files.
-- column series: In how many series; NULL for files.
-- column ids: Their ids: image, file or instance, 100 at most.
SELECT 'pixels' AS what, encode(i.pixel_hash, 'hex') AS content, count(*) AS count, count(DISTINCT st.patient_id) AS patients,
       count(DISTINCT n.series_id) AS series, (array_agg(i.id ORDER BY i.id))[:100] AS ids
FROM image i JOIN instance n ON n.id = i.instance_id JOIN series se ON se.id = n.series_id JOIN study st ON st.id = se.study_id
WHERE i.pixel_hash IS NOT NULL GROUP BY i.pixel_hash HAVING count(*) > 1
UNION ALL
SELECT 'file', encode(f.content_hash, 'hex'), count(*), NULL, NULL, (array_agg(f.id ORDER BY f.id))[:100]
FROM file f WHERE f.content_hash IS NOT NULL AND f.state = 'present' GROUP BY f.content_hash HAVING count(*) > 1
UNION ALL
SELECT 'uid', n.sop_instance_uid, count(*), count(DISTINCT st.patient_id), count(DISTINCT n.series_id), (array_agg(n.id ORDER BY n.id))[:100]
FROM instance n JOIN series se ON se.id = n.series_id JOIN study st ON st.id = se.study_id
WHERE n.sop_instance_uid <> '' GROUP BY n.sop_instance_uid HAVING count(*) > 1
ORDER BY what, count DESC, content
