-- title: Directions of rows and columns are impossible
-- severity: warning
-- subject: series
-- version: 1
-- means: ImageOrientationPatient must hold two vectors of length 1 at a right angle. Here a length is not 1, or the two are not at a right
--   angle, so the place of these images in the patient is not known: slices cannot be put in order, and contours in mm cannot be
--   brought onto them. Pixels, and contours in pixels, may still be right.
-- do: Look for the tool that wrote the headers (an anonymiser, a converter), and take the images from the original again.
-- parameter most: 0.002 ; largest deviation of a length from 1, or of the product of the two directions from 0
WITH skewed AS (
    SELECT n.series_id, greatest(abs(sqrt(o[1] * o[1] + o[2] * o[2] + o[3] * o[3]) - 1), abs(sqrt(o[4] * o[4] + o[5] * o[5] + o[6] * o[6]) - 1),
                                 abs(o[1] * o[4] + o[2] * o[5] + o[3] * o[6])) AS skew
    FROM scope c JOIN instance n ON n.series_id = c.series_id JOIN image i ON i.instance_id = n.id
    JOIN location l ON l.image_id = i.id AND l.preferred
    CROSS JOIN LATERAL (SELECT i.image_orientation AS o) v
    WHERE i.image_orientation IS NOT NULL
)
SELECT series_id AS subject_id, max(skew) AS value,
       format('in %s images the directions are off two unit vectors at a right angle, by up to %s (at most %s)',
              count(*), round(max(skew)::numeric, 4), :most) AS detail
FROM skewed WHERE skew > :most GROUP BY series_id

-- not evaluated
SELECT count(DISTINCT n.series_id), 'series with images that do not say in which direction they lie'
FROM scope c JOIN instance n ON n.series_id = c.series_id JOIN image i ON i.instance_id = n.id
JOIN location l ON l.image_id = i.id AND l.preferred
WHERE i.image_orientation IS NULL
