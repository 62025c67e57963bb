-- title: Annotation refers to an image that is not there
-- severity: warning
-- subject: annotation
-- version: 1
-- scope: all
-- means: The annotation's file names its image (a UID, with a frame where it says one, or a file), and the catalog has no such image. It
--   may have been paired by where its plane lies instead; otherwise it has no image, an error of its own (PAIR-NO-IMAGE).
-- do: Find the missing images and ingest them. If the study was given new UIDs, give the annotation's file the same ones.
SELECT a.id AS subject_id, NULL::float8 AS value,
       CASE WHEN a.refers_to ->> 'sop_instance_uid' IS NULL THEN 'the image file that it names is not there'
            WHEN k.id IS NULL THEN 'no image has the UID that it names'
            ELSE format('it names frame %s of an image that has %s', (a.refers_to ->> 'frame')::integer + 1, k.number_of_frames) END
       || coalesce('; paired by ' || p.method, '; it has no image') AS detail
FROM annotation a JOIN file f ON f.id = a.file_id
LEFT JOIN pairing p ON p.annotation_id = a.id AND p.state = 'accepted'
LEFT JOIN LATERAL (
    SELECT n.id, n.number_of_frames FROM instance n WHERE n.sop_instance_uid = a.refers_to ->> 'sop_instance_uid' AND n.number_of_frames > 0
    ORDER BY n.number_of_frames DESC, n.id LIMIT 1) k ON true
WHERE a.current AND CASE WHEN a.refers_to ->> 'sop_instance_uid' <> ''
    THEN k.id IS NULL OR (a.refers_to ->> 'frame')::integer >= k.number_of_frames
    ELSE a.refers_to ->> 'path' <> '' AND NOT EXISTS (
        SELECT FROM file g WHERE g.root_id = f.root_id AND g.path = a.refers_to ->> 'path' AND g.state = 'present') END
-- not evaluated
SELECT count(*), 'annotations whose source names no image, but a number or a place'
FROM annotation a
WHERE a.current AND a.origin NOT IN ('interpolated', 'proposed') AND coalesce(a.refers_to ->> 'sop_instance_uid', a.refers_to ->> 'path', '') = ''
