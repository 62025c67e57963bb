-- title: Annotations without an image
-- means: Current annotations of which nobody said for good on which image they were drawn: they are not fed.
-- must be empty: no
-- column annotation_id: The annotation.
-- column root: Storage place of its file.
-- column path: Its file there.
-- column source_key: Which annotation in the file; empty when it holds one.
-- column structure: What was drawn.
-- column reader: Who drew it.
-- column proposed: Pairings that wait for a decision (`catalog pair list`).
-- column rejected: Pairings that were rejected.
-- column why: What its open flags say.
SELECT a.id AS annotation_id, ro.name AS root, f.path, a.source_key, s.name AS structure, r.name AS reader,
       coalesce(p.proposed, 0) AS proposed, coalesce(p.rejected, 0) AS rejected, g.why
FROM annotation a JOIN file f ON f.id = a.file_id JOIN root ro ON ro.id = f.root_id
JOIN structure s ON s.id = a.structure_id JOIN reader r ON r.id = a.reader_id
LEFT JOIN (
    SELECT annotation_id, count(*) FILTER (WHERE state = 'proposed') AS proposed, count(*) FILTER (WHERE state = 'rejected') AS rejected,
           bool_or(state = 'accepted') AS accepted
    FROM pairing GROUP BY annotation_id
) p ON p.annotation_id = a.id
LEFT JOIN (
    SELECT annotation_id, string_agg(rule || ': ' || detail, '; ' ORDER BY id) AS why
    FROM flag WHERE state = 'open' AND annotation_id IS NOT NULL GROUP BY annotation_id
) g ON g.annotation_id = a.id
WHERE a.current AND NOT coalesce(p.accepted, false)
ORDER BY a.id
