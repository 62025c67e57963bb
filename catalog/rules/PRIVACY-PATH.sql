-- title: Path that looks as if it named a patient
-- severity: info
-- subject: series
-- version: 1
-- means: The path of an image, or of what is drawn on it, holds what looks like a person's name (Family^Given; Family, Given), a labelled
--   number (MRN, SSN, DOB), a social security number, an e-mail address, or a date so long before the study's that it may be a
--   birth date. PatientID, and the name that the annotations' source has for the patient, are how most archives name their folders:
--   they are looked for only where `patient_id` is true.
-- do: See `catalog sql` on view sample for the paths. Nothing, where patients may be known, or if it is none; else rename the folders (a
--   file that moved within its root keeps its place in the catalog).
-- parameter expected_clean: false says that there should be none in this catalog; true makes it an error
-- parameter patient_id: false true where PatientIDs are real ones, which should not stand in paths either
-- parameter years: 5 years by which a date in a path is before the study's date, or more, to be taken for a birth date
WITH at AS (
    SELECT c.series_id, l.file_id FROM scope c JOIN instance n ON n.series_id = c.series_id
    JOIN image i ON i.instance_id = n.id AND i.frame = 0 JOIN location l ON l.image_id = i.id
    UNION
    SELECT c.series_id, a.file_id FROM scope c JOIN instance n ON n.series_id = c.series_id JOIN image i ON i.instance_id = n.id
    JOIN pairing p ON p.image_id = i.id AND p.state <> 'rejected' JOIN annotation a ON a.id = p.annotation_id AND a.current
    UNION
    SELECT c.series_id, f.id FROM scope c JOIN instance n ON n.series_id = c.series_id JOIN file f ON f.instance_id = n.id
), odd AS MATERIALIZED (
    -- OFFSET 0: else the paths of the whole catalog are searched, and only then asked whether they are looked at.
    SELECT f.series_id, f.path, :patient_id AS asked FROM (
        SELECT at.series_id, f.path FROM at JOIN file f ON f.id = at.file_id AND f.state = 'present' OFFSET 0) AS f
    WHERE (:patient_id OR f.path ~ '[\^@,]' OR f.path ~ '[0-9]{3}-[0-9]{2}-[0-9]{4}'
        OR f.path ~* 'mrn|ssn|dob|geb|birth|born'
        OR f.path ~ '(^|[/_ -])((19|20)[0-9]{2}[-_.]?[01][0-9][-_.]?[0-3][0-9]|[0-3][0-9][-_.][01][0-9][-_.](19|20)[0-9]{2})($|[/_ .-])')
), told AS (
    SELECT o.series_id,
           o.asked AND EXISTS (SELECT FROM unnest(ARRAY[pt.patient_id, pt.original_id]) v (id)
                               WHERE length(v.id) > 2 AND position(v.id IN o.path) > 0) AS own,
           o.path ~ '[[:alpha:]]{2}\^[[:alpha:]]' OR o.path ~ '(^|/)[[:alpha:]''-]{2,}, ?[[:alpha:]]{2,}[^/]*(/|$)' AS name,
           o.path ~* '(^|[^[:alpha:]])(mrn|ssn|dob|geb|birth|birthdate|born)[ _=-]*[0-9]{4}' AS labelled,
           o.path ~ '(^|[^0-9-])[0-9]{3}-[0-9]{2}-[0-9]{4}($|[^0-9-])' AS ssn,
           o.path ~ '[[:alnum:]]@[[:alnum:]-]+[.][[:alpha:]]' AS mail,
           st.study_date ~ '^(19|20)[0-9]{2}' AND EXISTS (
               SELECT FROM regexp_matches(o.path,
                   '(?:^|[/_ -])(?:((?:19|20)[0-9]{2})[-_.]?(?:0[1-9]|1[0-2])[-_.]?(?:0[1-9]|[12][0-9]|3[01])|'
                   '(?:0[1-9]|[12][0-9]|3[01])[-_.](?:0[1-9]|1[0-2])[-_.]((?:19|20)[0-9]{2}))(?=$|[/_ -]|[.][[:alpha:]])', 'g') d (years)
               WHERE left(st.study_date, 4)::integer - coalesce(d.years[1], d.years[2])::integer >= :years) AS birth
    FROM odd o JOIN series se ON se.id = o.series_id JOIN study st ON st.id = se.study_id JOIN patient pt ON pt.id = st.patient_id
)
SELECT series_id AS subject_id, count(*)::float8 AS value,
       format('%s file(s) with %s in the path', count(*), array_to_string(ARRAY[
           CASE WHEN bool_or(own) THEN 'the name of its patient' END,
           CASE WHEN bool_or(name) THEN 'what looks like a name' END, CASE WHEN bool_or(labelled) THEN 'a labelled number' END,
           CASE WHEN bool_or(ssn) THEN 'what looks like a social security number' END,
           CASE WHEN bool_or(mail) THEN 'what looks like an e-mail address' END,
           CASE WHEN bool_or(birth) THEN format('a date %s or more years before the study', :years::float8) END], ', ')) AS detail,
       CASE WHEN :expected_clean THEN 'error' ELSE 'info' END AS severity
FROM told WHERE own OR name OR labelled OR ssn OR mail OR birth
GROUP BY series_id
-- not evaluated
SELECT count(*), 'series whose study has no date: dates in their paths are compared with nothing'
FROM scope c JOIN study st ON st.id = c.study_id WHERE st.study_date !~ '^(19|20)[0-9]{2}'
