-- title: Contour is not closed
-- severity: warning
-- subject: pairing
-- version: 1
-- means: From the contour's last point to its first the way is many times as long as from any point to the next, and a good part of the
--   whole outline: it was probably not drawn to its end. The mask takes the straight way there, and a part of it is missing.
-- do: Look at it (`catalog show`), and draw the missing part. A straight side that the reader left out on purpose is a false positive.
-- parameter steps: 5 times the median distance of neighbouring points that the gap may be wide
-- parameter share: 0.1 share of the outline's length that the gap may be wide
-- parameter least_points: 12 points from which on a contour is looked at; fewer are corners, and far apart anyway
SELECT p.id AS subject_id, h.gap_px / h.step_px AS value,
       format('%s px from its last point to its first, %s %% of its length; its points are %s px apart (median)',
              round(h.gap_px::numeric, 1), round((100 * h.gap_px / h.perimeter_px)::numeric), round(h.step_px::numeric, 2)) AS detail
FROM scope c
JOIN instance n ON n.series_id = c.series_id JOIN image i ON i.instance_id = n.id
JOIN location l ON l.image_id = i.id AND l.preferred JOIN file at ON at.id = l.file_id AND at.state = 'present'
JOIN pairing p ON p.image_id = i.id AND p.state = 'accepted' JOIN annotation a ON a.id = p.annotation_id AND a.current
JOIN shape h ON h.pairing_id = p.id
WHERE h.points >= :least_points AND h.step_px > 0 AND h.gap_px > :steps * h.step_px AND h.gap_px > :share * h.perimeter_px
-- not evaluated
SELECT count(*), 'contours of fewer points than it looks at, or without a shape yet'
FROM scope c
JOIN instance n ON n.series_id = c.series_id JOIN image i ON i.instance_id = n.id
JOIN pairing p ON p.image_id = i.id AND p.state = 'accepted'
JOIN annotation a ON a.id = p.annotation_id AND a.current AND a.kind = 'polygon'
JOIN mask m ON m.pairing_id = p.id LEFT JOIN shape h ON h.pairing_id = p.id
WHERE h.pairing_id IS NULL OR h.points < :least_points
