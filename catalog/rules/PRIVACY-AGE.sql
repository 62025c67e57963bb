-- title: Patient older than 89
-- severity: info
-- subject: series
-- version: 1
-- means: PatientAge (0010,1010), or StudyDate less PatientBirthDate, is 90 years or more. So few people are that old that an age above 89
--   identifies (HIPAA 164.514 counts it among the identifiers; one class "90 or older" is allowed). The age itself is not kept.
-- do: Nothing, where patients may be known. Else have PatientAge and PatientBirthDate emptied, or the age set to one class; if it is 090Y
--   in the whole archive for that reason, call it a false positive. A placeholder, such as a birth in 1901, looks the same.
-- parameter expected_clean: false says that there should be none in this catalog; true makes it an error
WITH here AS (
    SELECT n.* FROM scope c JOIN instance n ON n.series_id = c.series_id
    JOIN image i ON i.instance_id = n.id AND i.frame = 0 JOIN location l ON l.image_id = i.id AND l.preferred
    UNION ALL
    SELECT n.* FROM scope c JOIN instance n ON n.series_id = c.series_id
    WHERE EXISTS (SELECT FROM file f WHERE f.instance_id = n.id AND f.state = 'present')
)
SELECT series_id AS subject_id, count(*)::float8 AS value,
       format('%s object(s) say that the patient is 90 years or older', count(*)) AS detail,
       CASE WHEN :expected_clean THEN 'error' ELSE 'info' END AS severity
FROM here WHERE over_89
GROUP BY series_id
-- not evaluated
SELECT count(*), 'objects that tell no age and no two dates'
FROM scope c JOIN instance n ON n.series_id = c.series_id WHERE n.over_89 IS NULL
