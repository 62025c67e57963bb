-- title: File that ends too soon
-- severity: error
-- subject: file
-- version: 1
-- scope: all
-- means: The file ends before what its header promises: a copy was broken off, a disk was full, or a length in it is damaged. It is a cause
--   of FILE-UNREADABLE, named apart because the remedy is another.
-- do: Copy the file again from where it came. If it is as short there, ask its sender; no setting makes the missing pixels.
SELECT g.file_id AS subject_id, NULL::float8 AS value, substring(g.detail FROM 12) AS detail
FROM flag g WHERE g.rule = 'FILE-UNREADABLE' AND g.state = 'open' AND g.file_id IS NOT NULL AND starts_with(g.detail, 'truncated: ')
