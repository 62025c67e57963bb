-- title: More pixel data than the header describes
-- severity: warning
-- subject: series
-- version: 1
-- means: Uncompressed Pixel Data (7FE0,0010) is longer than rows × columns × samples × bits × frames and the byte that makes a length
--   even. Some programs pad, which harms nothing. It may also be that Rows, Columns or NumberOfFrames is wrong: then the images
--   are sheared or frames are missing. (Pixel data that is too short is FILE-TRUNCATED.)
-- do: Look at one of the images (`catalog show`). If it looks right and nothing is missing, the bytes are padding: call it a false
--   positive, or let such lengths pass with the parameter.
-- parameter most_bytes: 0 bytes; a surplus up to this is let pass
SELECT c.series_id AS subject_id, max(n.surplus_bytes)::float8 AS value,
       format('%s image file(s), instance number %s: up to %s bytes more than the header describes (a frame has %s)', count(*),
              array_to_string((array_agg(coalesce(n.instance_number::text, 'none') ORDER BY n.instance_number))[:5], ', ')
              || CASE WHEN count(*) > 5 THEN ', …' ELSE '' END,
              max(n.surplus_bytes), coalesce(max(l.byte_length)::text, 'no length of its own')) AS detail
FROM scope c JOIN instance n ON n.series_id = c.series_id AND n.surplus_bytes > :most_bytes
JOIN image i ON i.instance_id = n.id AND i.frame = 0 JOIN location l ON l.image_id = i.id AND l.preferred
GROUP BY c.series_id
-- not evaluated
SELECT count(*), 'objects ingested before their pixel data was compared; change the time of their files and ingest again'
FROM scope c JOIN instance n ON n.series_id = c.series_id WHERE n.identifying IS NULL
