-- title: Attributes that identify the patient
-- severity: info
-- subject: series
-- version: 1
-- means: The headers have values in attributes that PS3.15 E.1 (Basic Profile) empties or removes: names, addresses, numbers, birth dates,
--   institutions, devices. Only the tags are kept in the catalog. Blanks such as 00000000 or Anonymous do not count, nor does a
--   PatientName that repeats a PatientID with a digit in it. PatientID is not looked at: each patient has one.
-- do: Nothing, where patients may be known. Else have these attributes emptied and ingest again; those that may stay go into `allowed`.
-- parameter expected_clean: false says that there should be none in this catalog; true makes it an error
-- parameter allowed: - tags that may have a value, such as (0008,1010)(0018,1000); a hyphen for none
WITH here AS (
    SELECT n.* FROM scope c JOIN instance n ON n.series_id = c.series_id
    JOIN image i ON i.instance_id = n.id AND i.frame = 0 JOIN location l ON l.image_id = i.id AND l.preferred
    UNION ALL
    SELECT n.* FROM scope c JOIN instance n ON n.series_id = c.series_id
    WHERE EXISTS (SELECT FROM file f WHERE f.instance_id = n.id AND f.state = 'present')
), alike AS (
    SELECT series_id, identifying, count(*) AS objects FROM here WHERE cardinality(identifying) > 0 GROUP BY 1, 2
), attribute (tag, name) AS (VALUES
    ('(0008,0050)', 'AccessionNumber'), ('(0008,0080)', 'InstitutionName'), ('(0008,0081)', 'InstitutionAddress'),
    ('(0008,0090)', 'ReferringPhysicianName'), ('(0008,0092)', 'ReferringPhysicianAddress'),
    ('(0008,0094)', 'ReferringPhysicianTelephoneNumbers'), ('(0008,1010)', 'StationName'),
    ('(0008,1040)', 'InstitutionalDepartmentName'), ('(0008,1048)', 'PhysiciansOfRecord'), ('(0008,1050)', 'PerformingPhysicianName'),
    ('(0008,1060)', 'NameOfPhysiciansReadingStudy'), ('(0008,1070)', 'OperatorsName'), ('(0010,0010)', 'PatientName'),
    ('(0010,0030)', 'PatientBirthDate'), ('(0010,0032)', 'PatientBirthTime'), ('(0010,1000)', 'OtherPatientIDs'),
    ('(0010,1001)', 'OtherPatientNames'), ('(0010,1005)', 'PatientBirthName'), ('(0010,1040)', 'PatientAddress'),
    ('(0010,1060)', 'PatientMotherBirthName'), ('(0010,1080)', 'MilitaryRank'), ('(0010,1090)', 'MedicalRecordLocator'),
    ('(0010,2154)', 'PatientTelephoneNumbers'), ('(0010,4000)', 'PatientComments'), ('(0018,1000)', 'DeviceSerialNumber'),
    ('(0032,1032)', 'RequestingPhysician'), ('(0038,0300)', 'CurrentPatientLocation'), ('(0038,0400)', 'PatientInstitutionResidence')
), told AS (
    SELECT a.series_id, t.tag, sum(a.objects) AS objects FROM alike a CROSS JOIN LATERAL unnest(a.identifying) t (tag)
    WHERE position(t.tag IN :allowed::text) = 0 GROUP BY 1, 2
)
SELECT t.series_id AS subject_id, count(*)::float8 AS value,
       string_agg(format('%s %s in %s object(s)', coalesce(n.name, 'an attribute'), t.tag, t.objects), ', ' ORDER BY t.tag) AS detail,
       CASE WHEN :expected_clean THEN 'error' ELSE 'info' END AS severity
FROM told t LEFT JOIN attribute n ON n.tag = t.tag
GROUP BY t.series_id
-- not evaluated
SELECT count(*), 'objects ingested before their attributes were looked at; change the time of their files and ingest again'
FROM scope c JOIN instance n ON n.series_id = c.series_id WHERE n.identifying IS NULL
