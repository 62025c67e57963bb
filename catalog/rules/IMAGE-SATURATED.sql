-- title: Many pixels at the largest value
-- severity: warning
-- subject: image
-- version: 1
-- means: A large share of the pixels has the image's largest value: brighter parts were cut off, so that edges between them are lost. In a
--   plain picture, an ultrasound image or a radiograph, where white areas and burned-in text are common, it is an info.
-- do: Look whether the cut goes through what was drawn. If the file was converted with a window, take the original.
-- parameter most: 0.05 of the pixels; share at the largest value
SELECT i.id AS subject_id, m.saturated AS value,
       format('%s %% of the pixels have the largest value, %s (at most %s %%)', round((100 * m.saturated)::numeric, 1), m.maximum,
              round((100 * :most)::numeric, 1)) AS detail,
       CASE WHEN se.modality IN ('CT', 'MR', 'PT', 'NM') THEN 'warning' ELSE 'info' END AS severity
FROM scope c JOIN series se ON se.id = c.series_id JOIN instance n ON n.series_id = c.series_id JOIN image i ON i.instance_id = n.id
JOIN location l ON l.image_id = i.id AND l.preferred JOIN measure m ON m.image_id = i.id
WHERE m.saturated > :most AND m.minimum < m.maximum

-- not evaluated
SELECT count(*), 'images not measured; run `catalog measure`'
FROM scope c JOIN instance n ON n.series_id = c.series_id JOIN image i ON i.instance_id = n.id
JOIN location l ON l.image_id = i.id AND l.preferred
WHERE NOT EXISTS (SELECT FROM measure m WHERE m.image_id = i.id)
