-- title: Images of one series differ in size
-- severity: warning
-- subject: series
-- version: 1
-- means: Not all images of the series have the same rows and columns. Slices of one acquisition do; another size is a scout, a screenshot or
--   a derived image that came in under the same SeriesInstanceUID. Of radiographs, ultrasound and plain pictures, where sizes do vary, it
--   is an info. Frames of one multi-frame object are compared with each other.
-- do: Look at the images of the other size (`catalog gallery`), and leave them out if they are no part of the stack.
WITH sizes AS (
    SELECT n.series_id, CASE WHEN n.number_of_frames > 1 THEN n.id ELSE 0 END AS stack, i.rows, i.columns, count(*) AS images
    FROM scope c JOIN instance n ON n.series_id = c.series_id JOIN image i ON i.instance_id = n.id
    JOIN location l ON l.image_id = i.id AND l.preferred
    GROUP BY 1, 2, 3, 4
), mixed AS (
    SELECT series_id, stack, sum(images) - max(images) AS others, count(*) AS sizes,
           array_agg(format('%s of %s×%s px', images, rows, columns) ORDER BY images DESC, rows, columns) AS words
    FROM sizes GROUP BY series_id, stack HAVING count(*) > 1
)
SELECT m.series_id AS subject_id, m.others::float8 AS value,
       format('images differ in rows × columns: %s%s', array_to_string(m.words[1:4], ', '),
              CASE WHEN m.sizes > 4 THEN format(' and %s sizes more', m.sizes - 4) ELSE '' END) AS detail,
       CASE WHEN se.modality IN ('CT', 'MR', 'PT', 'NM') THEN 'warning' ELSE 'info' END AS severity
FROM mixed m JOIN series se ON se.id = m.series_id
