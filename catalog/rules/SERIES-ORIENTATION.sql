-- title: Images of one series lie in different directions
-- severity: warning
-- subject: series
-- version: 1
-- means: The directions of rows and columns (ImageOrientationPatient) are not the same in all images of the series. In a stack of parallel
--   slices that is a defect: images of another stack came in under the same SeriesInstanceUID. In a localizer, or a series that turns
--   around the patient, it is meant so: there the finding is an info. It is a warning where one direction has four fifths of the images
--   or more, so that the others look astray, or where images have the same InstanceNumber. Frames of one multi-frame object are compared
--   with each other.
-- do: Look at the images (`catalog gallery`). If two stacks share a UID, give one of them a UID of its own, and ingest again. Neighbouring
--   slices of such a series are not compared by any rule.
-- parameter most: 0.01 ; largest difference of a direction cosine that is still one direction; 0.01 is about 0.6 degrees
WITH mixed AS MATERIALIZED (
    SELECT n.series_id, CASE WHEN n.number_of_frames > 1 THEN n.id ELSE 0 END AS stack,
           greatest(max(o[1]) - min(o[1]), max(o[2]) - min(o[2]), max(o[3]) - min(o[3]),
                    max(o[4]) - min(o[4]), max(o[5]) - min(o[5]), max(o[6]) - min(o[6])) AS apart
    FROM scope c JOIN instance n ON n.series_id = c.series_id JOIN image i ON i.instance_id = n.id
    JOIN location l ON l.image_id = i.id AND l.preferred CROSS JOIN LATERAL (SELECT i.image_orientation AS o) v
    GROUP BY 1, 2
    HAVING greatest(max(o[1]) - min(o[1]), max(o[2]) - min(o[2]), max(o[3]) - min(o[3]),
                    max(o[4]) - min(o[4]), max(o[5]) - min(o[5]), max(o[6]) - min(o[6])) > :most
), shown AS (
    SELECT m.series_id, m.stack, m.apart, n.instance_number, i.image_orientation AS o
    FROM mixed m JOIN instance n ON n.series_id = m.series_id AND m.stack = CASE WHEN n.number_of_frames > 1 THEN n.id ELSE 0 END
    JOIN image i ON i.instance_id = n.id JOIN location l ON l.image_id = i.id AND l.preferred WHERE i.image_orientation IS NOT NULL
), counted AS (
    SELECT series_id, stack, apart, count(*) AS images, count(instance_number) > count(DISTINCT instance_number) AND stack = 0 AS doubled
    FROM shown GROUP BY series_id, stack, apart
), directions AS (
    SELECT series_id, stack, k.images, k.doubled, k.apart, count(*) AS alike
    FROM shown s JOIN counted k USING (series_id, stack)
    GROUP BY series_id, stack, k.images, k.doubled, k.apart, round(o[1]::numeric, 2), round(o[2]::numeric, 2), round(o[3]::numeric, 2),
             round(o[4]::numeric, 2), round(o[5]::numeric, 2), round(o[6]::numeric, 2)
)
SELECT series_id AS subject_id, max(apart) AS value,
       format('%s images lie in %s directions, %s of them in the commonest; direction cosines differ by up to %s, more than %s%s',
              images, count(*), max(alike), round(max(apart)::numeric, 4), :most,
              CASE WHEN doubled THEN '; some have the same InstanceNumber' ELSE '' END) AS detail,
       CASE WHEN doubled OR max(alike) >= 0.8 * images THEN 'warning' ELSE 'info' END AS severity
FROM directions GROUP BY series_id, stack, images, doubled

-- not evaluated
SELECT count(DISTINCT n.series_id), 'series with images that do not say in which direction they lie'
FROM scope c JOIN instance n ON n.series_id = c.series_id JOIN image i ON i.instance_id = n.id
JOIN location l ON l.image_id = i.id AND l.preferred
WHERE i.image_orientation IS NULL
