-- title: Tiny mask
-- severity: warning
-- subject: pairing
-- version: 1
-- means: The mask has some pixels, but so few that it is rather a click than a structure. Of contours this is a warning. Of segments it is
--   an info: where a volume's segment ends, its last slice often has a pixel or two, and is right.
-- do: Look at it (`catalog show`). Where structures are that small, set the limits lower (`catalog qa set`).
-- parameter least_px: 5 px that a mask must have; the smallest right contours of the heart's tip have 77 px
-- parameter least_mm2: 3 mm² that it must have, a disc of 2 mm; the same contours have 144 mm²
SELECT p.id AS subject_id, m.area_px::float8 AS value,
       format('%s px%s; at least %s px and %s mm² are expected', m.area_px,
              ', ' || round((m.area_px * i.row_spacing * i.column_spacing)::numeric, 2) || ' mm²', :least_px, :least_mm2) AS detail,
       CASE a.kind WHEN 'polygon' THEN 'warning' ELSE 'info' END AS severity
FROM scope c
JOIN instance n ON n.series_id = c.series_id JOIN image i ON i.instance_id = n.id
JOIN location l ON l.image_id = i.id AND l.preferred JOIN file at ON at.id = l.file_id AND at.state = 'present'
JOIN pairing p ON p.image_id = i.id AND p.state = 'accepted' JOIN annotation a ON a.id = p.annotation_id AND a.current
JOIN mask m ON m.pairing_id = p.id
WHERE m.area_px > 0 AND (m.area_px < :least_px OR m.area_px * i.row_spacing * i.column_spacing < :least_mm2)
-- not evaluated
SELECT count(*), 'masks on images without pixel spacing, of which only the pixels were counted'
FROM scope c
JOIN instance n ON n.series_id = c.series_id JOIN image i ON i.instance_id = n.id
JOIN pairing p ON p.image_id = i.id AND p.state = 'accepted' JOIN annotation a ON a.id = p.annotation_id AND a.current
JOIN mask m ON m.pairing_id = p.id
WHERE i.row_spacing IS NULL OR i.column_spacing IS NULL
