-- title: All pixels have the same value
-- severity: warning
-- subject: image
-- version: 1
-- means: The image is empty: nothing can be seen on it. Such are padding slices, frames that were not acquired, and files whose pixels were
--   lost on the way. If a mask that is not empty lies on it, that is an error: nobody drew it on this image.
-- do: Look at the slices beside it (`catalog show`). If pixels were lost, get the file again; else nothing has to be done.
SELECT i.id AS subject_id, m.minimum AS value,
       format('all %s pixels are %s%s', i.rows::bigint * i.columns, m.minimum, CASE WHEN drawn.yes THEN ', and a mask lies on it' ELSE '' END) AS detail,
       CASE WHEN drawn.yes THEN 'error' ELSE 'warning' END AS severity
FROM scope c JOIN instance n ON n.series_id = c.series_id JOIN image i ON i.instance_id = n.id
JOIN location l ON l.image_id = i.id AND l.preferred JOIN measure m ON m.image_id = i.id
CROSS JOIN LATERAL (SELECT EXISTS (
    SELECT FROM pairing p JOIN annotation a ON a.id = p.annotation_id AND a.current JOIN mask k ON k.pairing_id = p.id
    WHERE p.image_id = i.id AND p.state = 'accepted' AND k.area_px > 0) AS yes) drawn
WHERE m.minimum = m.maximum AND m.minimum <> 'NaN'

-- not evaluated
SELECT count(*), 'images not measured; run `catalog measure`'
FROM scope c JOIN instance n ON n.series_id = c.series_id JOIN image i ON i.instance_id = n.id
JOIN location l ON l.image_id = i.id AND l.preferred
WHERE NOT EXISTS (SELECT FROM measure m WHERE m.image_id = i.id)
