-- title: Fewer images than the files say there are
-- severity: warning
-- subject: series
-- version: 1
-- means: The files say how many images their acquisition has (ImagesInAcquisition); in the series there are fewer. Slices or phases are
--   missing, perhaps at an end, where they leave no gap. Frames of a multi-frame object count as images. A series may hold several
--   acquisitions, which can hide that one is incomplete; and an acquisition that was stored as several series is no defect.
-- do: Ask where the data came from for the rest. What is there can be used as it is, but not for whole volumes.
WITH claims AS (
    SELECT n.series_id, n.images_in_acquisition AS claimed, count(*) AS images
    FROM scope c JOIN instance n ON n.series_id = c.series_id JOIN image i ON i.instance_id = n.id
    JOIN location l ON l.image_id = i.id AND l.preferred
    WHERE n.images_in_acquisition IS NOT NULL
    GROUP BY 1, 2
)
SELECT series_id AS subject_id, max(claimed - images)::float8 AS value,
       string_agg(format('%s images where ImagesInAcquisition says %s', images, claimed), '; ' ORDER BY claimed) AS detail
FROM claims WHERE images < claimed GROUP BY series_id

-- not evaluated
SELECT count(*), 'series that do not say how many images they have' FROM (
    SELECT FROM scope c JOIN instance n ON n.series_id = c.series_id JOIN image i ON i.instance_id = n.id
    JOIN location l ON l.image_id = i.id AND l.preferred GROUP BY n.series_id HAVING count(n.images_in_acquisition) = 0) AS silent
