-- title: Not said to be de-identified
-- severity: info
-- subject: series
-- version: 1
-- means: PatientIdentityRemoved (0012,0062) does not say YES: it says NO, or is not there. A program that de-identifies says by it that it
--   did (PS3.15 E.1). That is no proof, and older archives that are de-identified lack it too.
-- do: Nothing, where patients may be known. Else de-identify the files and ingest again, or find out how it was done.
-- parameter expected_clean: false says that there should be none in this catalog; true makes it an error
WITH here AS (
    SELECT n.* FROM scope c JOIN instance n ON n.series_id = c.series_id
    JOIN image i ON i.instance_id = n.id AND i.frame = 0 JOIN location l ON l.image_id = i.id AND l.preferred
    UNION ALL
    SELECT n.* FROM scope c JOIN instance n ON n.series_id = c.series_id
    WHERE EXISTS (SELECT FROM file f WHERE f.instance_id = n.id AND f.state = 'present')
)
SELECT series_id AS subject_id, count(*)::float8 AS value,
       format('PatientIdentityRemoved (0012,0062) is NO in %s object(s), missing or something else in %s',
              count(*) FILTER (WHERE upper(trim(identity_removed)) = 'NO'), count(*) FILTER (WHERE upper(trim(identity_removed)) <> 'NO'))
       AS detail,
       CASE WHEN :expected_clean THEN 'error' ELSE 'info' END AS severity
FROM here WHERE sop_class_uid <> '' AND upper(trim(identity_removed)) <> 'YES'
GROUP BY series_id
-- not evaluated
SELECT count(*), 'objects of files that are no DICOM, or do not say their class' FROM scope c JOIN instance n ON n.series_id = c.series_id
WHERE n.sop_class_uid = ''
