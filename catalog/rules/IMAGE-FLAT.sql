-- title: Almost nothing can be seen on it
-- severity: warning
-- subject: image
-- version: 1
-- means: Almost all pixels have nearly the same value: a histogram of 256 bins has next to no information, or the values spread far less
--   than on the other images of the series. It may be noise alone, one bright dot, or a slice beyond the body.
-- do: Look at it beside its neighbours (`catalog show`).
-- parameter bits: 0.1 bits; entropy of the histogram below which it is flat
-- parameter share: 0.02 of the mean standard deviation in the series; spread of the values below which it is flat
WITH measured AS (
    SELECT i.id, n.series_id, m.entropy, m.deviation
    FROM scope c JOIN instance n ON n.series_id = c.series_id JOIN image i ON i.instance_id = n.id
    JOIN location l ON l.image_id = i.id AND l.preferred JOIN measure m ON m.image_id = i.id
    WHERE m.minimum < m.maximum AND m.maximum <> 'NaN'
), usual AS (
    SELECT series_id, avg(deviation) AS deviation FROM measured GROUP BY series_id
)
SELECT m.id AS subject_id, m.entropy AS value,
       format('its values have an entropy of %s bits and deviate by %s; in the series they deviate by %s', round(m.entropy::numeric, 3),
              round(m.deviation::numeric, 3), round(u.deviation::numeric, 3)) AS detail
FROM measured m JOIN usual u USING (series_id)
WHERE m.entropy < :bits OR m.deviation < :share * u.deviation

-- not evaluated
SELECT count(*), 'images not measured; run `catalog measure`'
FROM scope c JOIN instance n ON n.series_id = c.series_id JOIN image i ON i.instance_id = n.id
JOIN location l ON l.image_id = i.id AND l.preferred
WHERE NOT EXISTS (SELECT FROM measure m WHERE m.image_id = i.id)
