-- title: Mask covers most of its image
-- severity: warning
-- subject: pairing
-- version: 1
-- means: The mask has more of the image's pixels than a structure has. Often the background was labelled instead of the structure, a
--   segment is the wrong way round, or a contour is in other units.
-- do: Look at it (`catalog show`). For structures that fill the picture (the body, a cropped organ) set the limit higher.
-- parameter most: 0.5 share of the image's pixels that a mask may have; right ones of the heart have up to 0.05
SELECT p.id AS subject_id, m.area_px::float8 / (m.rows::bigint * m.columns) AS value,
       format('%s px of %s×%s, %s %% of the image', m.area_px, m.rows, m.columns,
              round(100.0 * m.area_px / (m.rows::bigint * m.columns), 1)) AS detail
FROM scope c
JOIN instance n ON n.series_id = c.series_id JOIN image i ON i.instance_id = n.id
JOIN location l ON l.image_id = i.id AND l.preferred JOIN file at ON at.id = l.file_id AND at.state = 'present'
JOIN pairing p ON p.image_id = i.id AND p.state = 'accepted' JOIN annotation a ON a.id = p.annotation_id AND a.current
JOIN mask m ON m.pairing_id = p.id
WHERE m.area_px > :most * (m.rows::bigint * m.columns)
