-- title: Label value that nothing names
-- severity: warning
-- subject: annotation
-- version: 1
-- means: A value stands in a label volume whose list of labels has others but not this one; or a segment has no label in its own file; or
--   an image's class is none of those that were said to be expected (an error: nothing can be learned from it). What it stands for is
--   not known: often a slip of the brush, a leftover of another protocol, or values changed by resampling.
-- do: Ask whoever drew it; add the value to the list of labels, or correct the file. Say which classes there are:
--   `catalog qa set LABEL-UNEXPECTED classes "0|1|2" -m WHY`.
-- parameter classes: any class labels that may be there, with | between them; any: classes are not looked at
WITH drawn AS (
    SELECT a.id, a.kind, a.label, a.refers_to, s.name, f.root_id, f.format, regexp_replace(f.path, '(^|/)[^/]+/[^/]+$', '') AS data_set
    FROM scope c
    JOIN instance n ON n.series_id = c.series_id JOIN image i ON i.instance_id = n.id
    JOIN location l ON l.image_id = i.id AND l.preferred JOIN file at ON at.id = l.file_id AND at.state = 'present'
    JOIN pairing p ON p.image_id = i.id AND p.state = 'accepted' JOIN annotation a ON a.id = p.annotation_id AND a.current
    JOIN structure s ON s.id = a.structure_id JOIN file f ON f.id = a.file_id
    WHERE a.kind = 'label' OR a.kind = 'segment' AND (s.name LIKE 'label %' OR s.name LIKE 'segment %')
), named AS (
    SELECT DISTINCT f.root_id, regexp_replace(f.path, '(^|/)[^/]+/[^/]+$', '') AS data_set
    FROM file f JOIN annotation a ON a.file_id = f.id AND a.current JOIN structure s ON s.id = a.structure_id
    WHERE f.format = 'nifti' AND f.kind = 'annotation' AND s.name <> 'label ' || (a.refers_to ->> 'value')
)
SELECT d.id AS subject_id, coalesce((d.refers_to ->> 'value')::float8, (d.refers_to ->> 'segment_number')::float8) AS value,
       CASE d.kind WHEN 'label' THEN format('class %s, which is none of %s', d.label, :classes::text)
            ELSE CASE d.format WHEN 'nifti' THEN format('value %s, which the list of labels does not name', d.refers_to ->> 'value')
                 ELSE format('segment %s, which has no label in its file', d.refers_to ->> 'segment_number') END END AS detail,
       CASE d.kind WHEN 'label' THEN 'error' ELSE 'warning' END AS severity
FROM drawn d LEFT JOIN named ON named.root_id = d.root_id AND named.data_set = d.data_set
WHERE CASE WHEN d.kind = 'label' THEN :classes::text <> 'any' AND d.label <> ALL (string_to_array(:classes::text, '|'))
           WHEN d.format = 'nifti' THEN named.root_id IS NOT NULL AND d.name = 'label ' || (d.refers_to ->> 'value')
           ELSE d.name = 'segment ' || (d.refers_to ->> 'segment_number') END
-- not evaluated
WITH named AS (
    SELECT DISTINCT f.root_id, regexp_replace(f.path, '(^|/)[^/]+/[^/]+$', '') AS data_set
    FROM file f JOIN annotation a ON a.file_id = f.id AND a.current JOIN structure s ON s.id = a.structure_id
    WHERE f.format = 'nifti' AND f.kind = 'annotation' AND s.name <> 'label ' || (a.refers_to ->> 'value')
), drawn AS (
    SELECT a.kind, count(*) AS found
    FROM scope c
    JOIN instance n ON n.series_id = c.series_id JOIN image i ON i.instance_id = n.id
    JOIN pairing p ON p.image_id = i.id AND p.state = 'accepted' JOIN annotation a ON a.id = p.annotation_id AND a.current
    JOIN file f ON f.id = a.file_id
    WHERE a.kind = 'label' AND :classes::text = 'any' OR f.format = 'nifti' AND NOT EXISTS (
        SELECT FROM named d WHERE d.root_id = f.root_id AND d.data_set = regexp_replace(f.path, '(^|/)[^/]+/[^/]+$', ''))
    GROUP BY 1
)
SELECT found, CASE kind WHEN 'label' THEN 'classes, as nobody said which to expect' ELSE 'segments of label volumes without a list' END
FROM drawn
