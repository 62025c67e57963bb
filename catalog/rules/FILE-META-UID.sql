-- title: Two SOP Instance UIDs in one file
-- severity: warning
-- subject: series
-- version: 1
-- means: MediaStorageSOPInstanceUID (0002,0003) in front of the file is not SOPInstanceUID (0008,0018) in its header. PS3.10 7.1 says that
--   they are equal. A program rewrote one of them and not the other: often a de-identification that forgot the first, which then
--   still leads to the original image. The catalog goes by SOPInstanceUID.
-- do: Ask who wrote the files. If they are to be de-identified, have them written again.
SELECT c.series_id AS subject_id, count(*)::float8 AS value,
       format('%s file(s), instance number %s: MediaStorageSOPInstanceUID (0002,0003) is not SOPInstanceUID (0008,0018)%s', count(*),
              array_to_string((array_agg(coalesce(n.instance_number::text, 'none') ORDER BY n.instance_number))[:5], ', ')
              || CASE WHEN count(*) > 5 THEN ', …' ELSE '' END,
              CASE WHEN count(*) FILTER (WHERE n.sop_instance_uid = '') > 0
                   THEN format(', which is missing in %s', count(*) FILTER (WHERE n.sop_instance_uid = '')) ELSE '' END) AS detail
FROM scope c JOIN instance n ON n.series_id = c.series_id AND n.other_meta_uid
WHERE EXISTS (SELECT FROM image i JOIN location l ON l.image_id = i.id AND l.preferred WHERE i.instance_id = n.id)
   OR EXISTS (SELECT FROM file f WHERE f.instance_id = n.id AND f.state = 'present')
GROUP BY c.series_id
-- not evaluated
SELECT count(*), 'objects ingested before the two were compared; change the time of their files and ingest again'
FROM scope c JOIN instance n ON n.series_id = c.series_id WHERE n.identifying IS NULL
