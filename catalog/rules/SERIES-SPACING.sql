-- title: Images of one series differ in pixel spacing
-- severity: warning
-- subject: series
-- version: 1
-- means: The mm between rows or columns (PixelSpacing) are not the same in all images of the series, or some images lack them. The same
--   structure then covers another number of pixels in some of them, and areas in mm² can only be compared image by image. Of radiographs,
--   ultrasound and plain pictures it is an info. Frames of one multi-frame object are compared with each other.
-- do: Find out whether the images are two reconstructions under one SeriesInstanceUID, or whether a spacing was written wrongly.
-- parameter most: 0.001 mm; largest difference that is still one spacing
WITH stacks AS (
    SELECT n.series_id, CASE WHEN n.number_of_frames > 1 THEN n.id ELSE 0 END AS stack, count(*) AS images,
           count(i.row_spacing + i.column_spacing) AS known, min(i.row_spacing) AS rows_from, max(i.row_spacing) AS rows_to,
           min(i.column_spacing) AS columns_from, max(i.column_spacing) AS columns_to
    FROM scope c JOIN instance n ON n.series_id = c.series_id JOIN image i ON i.instance_id = n.id
    JOIN location l ON l.image_id = i.id AND l.preferred
    GROUP BY 1, 2
)
SELECT s.series_id AS subject_id, greatest(rows_to - rows_from, columns_to - columns_from) AS value,
       format('rows are %s to %s mm apart, columns %s to %s mm (they may differ by %s mm)%s',
              round(rows_from::numeric, 6), round(rows_to::numeric, 6), round(columns_from::numeric, 6), round(columns_to::numeric, 6), :most,
              CASE WHEN known < images THEN format('; %s of %s images do not say', images - known, images) ELSE '' END) AS detail,
       CASE WHEN se.modality IN ('CT', 'MR', 'PT', 'NM') THEN 'warning' ELSE 'info' END AS severity
FROM stacks s JOIN series se ON se.id = s.series_id
WHERE greatest(rows_to - rows_from, columns_to - columns_from) > :most OR known > 0 AND known < images

-- not evaluated
SELECT count(DISTINCT n.series_id), 'series with images that do not say how far their pixels are apart'
FROM scope c JOIN instance n ON n.series_id = c.series_id JOIN image i ON i.instance_id = n.id
JOIN location l ON l.image_id = i.id AND l.preferred
WHERE i.row_spacing IS NULL OR i.column_spacing IS NULL
