-- title: Text burned into the pixels
-- severity: warning
-- subject: series
-- version: 1
-- means: BurnedInAnnotation (0028,0301) says YES: the pixels themselves hold text that names the patient. No change of the header removes
--   it, and a network may learn to read it.
-- do: Look at the images. Leave them out, or have the text covered; then set BurnedInAnnotation to NO and ingest again. Where it is missing
--   (most MR and CT), nothing is known: look at a few, above all of ultrasound, angiography and secondary captures.
-- parameter expected_clean: false says that there should be none in this catalog; true makes it an error
WITH here AS (
    SELECT n.* FROM scope c JOIN instance n ON n.series_id = c.series_id
    JOIN image i ON i.instance_id = n.id AND i.frame = 0 JOIN location l ON l.image_id = i.id AND l.preferred
    UNION ALL
    SELECT n.* FROM scope c JOIN instance n ON n.series_id = c.series_id
    WHERE EXISTS (SELECT FROM file f WHERE f.instance_id = n.id AND f.state = 'present')
)
SELECT series_id AS subject_id, count(*)::float8 AS value,
       format('BurnedInAnnotation (0028,0301) is YES in %s object(s)', count(*)) AS detail,
       CASE WHEN :expected_clean THEN 'error' ELSE 'warning' END AS severity
FROM here WHERE upper(trim(burned_in_annotation)) = 'YES'
GROUP BY series_id
-- not evaluated
SELECT count(*), 'objects that do not say whether text is burned in'
FROM scope c JOIN instance n ON n.series_id = c.series_id WHERE upper(trim(n.burned_in_annotation)) NOT IN ('YES', 'NO')
