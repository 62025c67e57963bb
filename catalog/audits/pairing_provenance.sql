-- title: Why an annotation belongs to its image
-- means: One row a pairing of a current annotation: how it was found, by which rule in words, how sure that is, and who decided.
-- must be empty: no
-- column pairing_id: The pairing.
-- column annotation_id: What was drawn.
-- column structure: Its structure.
-- column reader: Who drew it.
-- column path: File of the annotation, in its root.
-- column sample_id: On which image.
-- column method: How it was found.
-- column rule: The rule in words, with what it matched.
-- column score: How sure, 0 to 1.
-- column state: proposed, accepted or rejected.
-- column actor: Who decided.
-- column by_person: Was it a person, and no layout?
-- column at: When.
-- column decisions: Rows of the event log about this pairing.
SELECT p.id AS pairing_id, a.id AS annotation_id, s.name AS structure, r.name AS reader, f.path, p.image_id AS sample_id, p.method, p.rule,
       p.score, p.state, p.actor, p.actor NOT LIKE 'layout:%' AS by_person, p.at, coalesce(e.decisions, 0) AS decisions
FROM pairing p JOIN annotation a ON a.id = p.annotation_id AND a.current
JOIN structure s ON s.id = a.structure_id JOIN reader r ON r.id = a.reader_id JOIN file f ON f.id = a.file_id
LEFT JOIN (SELECT subject_id, count(*) AS decisions FROM event WHERE subject = 'pairing' GROUP BY subject_id) e ON e.subject_id = p.id
ORDER BY p.id
