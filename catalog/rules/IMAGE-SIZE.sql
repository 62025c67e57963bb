-- title: Image far larger or smaller than the others
-- severity: warning
-- subject: image
-- version: 1
-- scope: all
-- means: The longer side of the image is many times longer or shorter than is usual (the median) among the images of its modality in this
--   catalog: a thumbnail, a screenshot, a scanned page. Scaled to the size of the others it shows things at another scale.
--   Where the modality is not known (plain pictures, NIfTI) it is an info.
-- do: Look at it. If it is none of the images you train on, leave its series out.
-- parameter times: 3 times; how much longer or shorter the longer side may be
-- parameter images: 20 ; so many images a modality must have to say what is usual
-- parameter share: 0.8 of the images; so many must be of about the usual size, else none is usual
WITH sizes AS (
    SELECT se.modality, greatest(i.rows, i.columns) AS side, count(*) AS images
    FROM series se JOIN instance n ON n.series_id = se.id JOIN image i ON i.instance_id = n.id
    JOIN location l ON l.image_id = i.id AND l.preferred
    GROUP BY 1, 2
), usual AS (
    SELECT modality, min(side) AS side, min(of_all) AS of_all FROM (
        SELECT *, sum(images) OVER (PARTITION BY modality ORDER BY side) AS upto, sum(images) OVER (PARTITION BY modality) AS of_all FROM sizes
    ) AS running WHERE 2 * upto >= of_all AND of_all >= :images GROUP BY modality
), compared AS (
    SELECT s.modality, s.side, u.side AS usual, s.side > :times * u.side OR u.side > :times * s.side AS far, s.images, u.of_all
    FROM sizes s JOIN usual u USING (modality)
), far AS (
    SELECT * FROM compared
    WHERE far AND modality IN (SELECT modality FROM compared WHERE NOT far GROUP BY modality HAVING sum(images) >= :share * min(of_all))
)
SELECT i.id AS subject_id, greatest(f.side::float8 / f.usual, f.usual::float8 / f.side) AS value,
       format('%s×%s px; the longer side of images of modality %s is usually %s px', i.rows, i.columns, coalesce(nullif(f.modality, ''), 'unknown'),
              f.usual) AS detail,
       CASE WHEN f.modality = '' THEN 'info' ELSE 'warning' END AS severity
FROM far f JOIN series se ON se.modality = f.modality JOIN instance n ON n.series_id = se.id
JOIN image i ON i.instance_id = n.id AND greatest(i.rows, i.columns) = f.side JOIN location l ON l.image_id = i.id AND l.preferred

-- not evaluated
WITH sizes AS (
    SELECT se.modality, greatest(i.rows, i.columns) AS side, count(*) AS images
    FROM series se JOIN instance n ON n.series_id = se.id JOIN image i ON i.instance_id = n.id
    JOIN location l ON l.image_id = i.id AND l.preferred
    GROUP BY 1, 2
), usual AS (
    SELECT modality, min(side) AS side, min(of_all) AS of_all FROM (
        SELECT *, sum(images) OVER (PARTITION BY modality ORDER BY side) AS upto, sum(images) OVER (PARTITION BY modality) AS of_all FROM sizes
    ) AS running WHERE 2 * upto >= of_all AND of_all >= :images GROUP BY modality
), compared AS (
    SELECT s.modality, s.side, u.side AS usual, s.side > :times * u.side OR u.side > :times * s.side AS far, s.images, u.of_all
    FROM sizes s JOIN usual u USING (modality)
)
SELECT coalesce(sum(images), 0), 'images of a modality that has too few in this catalog' FROM sizes WHERE modality NOT IN (SELECT modality FROM usual)
UNION ALL
SELECT coalesce(sum(of_all), 0), 'images of a modality that has no usual size' FROM (
    SELECT min(of_all) AS of_all FROM compared GROUP BY modality
    HAVING coalesce(sum(images) FILTER (WHERE NOT far), 0) < :share * min(of_all)) AS varied
