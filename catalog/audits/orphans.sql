-- title: Rows that contradict each other
-- means: What no constraint forbids and no command of scanfeed leaves behind: somebody wrote to the database by other ways, or there is a
--   bug in scanfeed. Either way the rows named here cannot be trusted.
-- must be empty: yes
-- column what: What is wrong, in words.
-- column subject: Table of the row.
-- column subject_id: Its id there.
SELECT 'a study without series' AS what, 'study' AS subject, st.id AS subject_id
FROM study st WHERE NOT EXISTS (SELECT FROM series se WHERE se.study_id = st.id)
UNION ALL
SELECT 'a series without objects', 'series', se.id FROM series se WHERE NOT EXISTS (SELECT FROM instance n WHERE n.series_id = se.id)
UNION ALL
SELECT 'an object of several frames without images', 'instance', n.id
FROM instance n WHERE n.number_of_frames > 0 AND NOT EXISTS (SELECT FROM image i WHERE i.instance_id = n.id)
UNION ALL
SELECT 'a frame that its object does not have', 'image', i.id
FROM image i JOIN instance n ON n.id = i.instance_id WHERE i.frame >= n.number_of_frames
UNION ALL
SELECT 'an image with a present file and no preferred location', 'image', l.image_id
FROM location l JOIN file f ON f.id = l.file_id GROUP BY l.image_id HAVING bool_or(f.state = 'present') AND NOT bool_or(l.preferred)
UNION ALL
SELECT 'an accepted pairing without a mask, and no flag says why', 'pairing', p.id
FROM pairing p JOIN annotation a ON a.id = p.annotation_id AND a.current AND a.kind <> 'label'
LEFT JOIN mask m ON m.pairing_id = p.id
WHERE p.state = 'accepted' AND m.pairing_id IS NULL
  AND NOT EXISTS (SELECT FROM flag g WHERE g.pairing_id = p.id) AND NOT EXISTS (SELECT FROM flag g WHERE g.annotation_id = a.id)
UNION ALL
SELECT 'a mask whose grid is not that of its image', 'pairing', p.id
FROM mask m JOIN pairing p ON p.id = m.pairing_id JOIN image i ON i.id = p.image_id
WHERE p.state = 'accepted' AND (m.rows, m.columns) IS DISTINCT FROM (i.rows, i.columns)
UNION ALL
SELECT 'a mask with bits set behind its last pixel', 'pairing', m.pairing_id
FROM mask m WHERE length(m.bits) > 0
  AND get_byte(m.bits, length(m.bits) - 1) & ((1 << (8 * length(m.bits) - m.box_rows * m.box_columns)) - 1) <> 0
UNION ALL
SELECT 'a shape that is not that of its mask', 'pairing', h.pairing_id
FROM shape h LEFT JOIN mask m ON m.pairing_id = h.pairing_id
WHERE m.pairing_id IS NULL OR h.largest_px > m.area_px OR (m.area_px > 0) <> (h.components > 0)
   OR (h.components = 1 AND h.largest_px <> m.area_px)
UNION ALL
SELECT 'two current versions of one annotation', 'annotation', max(a.id)
FROM annotation a WHERE a.current GROUP BY a.file_id, a.source_key HAVING count(*) > 1
UNION ALL
SELECT 'a closed flag that nobody closed', 'flag', g.id FROM flag g WHERE g.state <> 'open' AND coalesce(g.closed_by, '') = ''
UNION ALL
SELECT 'an order that is not whole', 'epoch', e.id
FROM epoch e LEFT JOIN (SELECT epoch_id, sum(cardinality(sample_ids)) AS stored FROM epoch_order GROUP BY epoch_id) o ON o.epoch_id = e.id
WHERE e.order_sha256 IS NOT NULL AND e.pruned_at IS NULL AND coalesce(o.stored, 0) <> e.num_samples
ORDER BY what, subject_id
