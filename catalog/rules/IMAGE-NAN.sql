-- title: Pixels that are no number
-- severity: error
-- subject: image
-- version: 1
-- means: After the modality transform (slope, intercept or table) some pixels are not a number, or infinite. One such pixel in a batch makes
--   the loss of a training not a number, and its weights with it.
-- do: Find out what wrote the file; a background stored as NaN has to be replaced there. Or leave the image out.
SELECT i.id AS subject_id, m.nans::float8 AS value, format('%s of %s values are not finite', m.nans, i.rows::bigint * i.columns * i.samples_per_pixel) AS detail
FROM scope c JOIN instance n ON n.series_id = c.series_id JOIN image i ON i.instance_id = n.id
JOIN location l ON l.image_id = i.id AND l.preferred JOIN measure m ON m.image_id = i.id
WHERE m.nans > 0

-- not evaluated
SELECT count(*), 'images not measured; run `catalog measure`'
FROM scope c JOIN instance n ON n.series_id = c.series_id JOIN image i ON i.instance_id = n.id
JOIN location l ON l.image_id = i.id AND l.preferred
WHERE NOT EXISTS (SELECT FROM measure m WHERE m.image_id = i.id)
