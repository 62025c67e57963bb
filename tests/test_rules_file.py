"""Rules about files, UIDs and privacy, on files: what is planted in one is found and said in words, what is right is not, and it closes."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psycopg
import pytest
from pydicom import config, dcmread
from pydicom.datadict import dictionary_VR, keyword_for_tag

from catalog import database, ingest, privacy, qa, rulefiles, synthetic

Conn = psycopg.Connection[Any]
Found = dict[str, tuple[str, float | None, str]]  # path of a file → severity, value, detail


class Archive:
    """A folder of two small studies and a catalog of it."""

    def __init__(self, folder: Path, url: str, threads: ThreadPoolExecutor) -> None:
        self.folder, self.url, self.threads = folder, url, threads

    def image(self, number: int, patient: int = 1) -> Path:
        return self.folder / "dicoms" / f"SYN{patient:04d}" / f"{number}.dcm"

    def edit(self, number: int, patient: int = 1, **elements: object) -> None:
        """Set elements of an image's header, and MediaStorageSOPInstanceUID by `meta`."""
        path = self.image(number, patient)
        with config.disable_value_validation():
            dataset = dcmread(path)
            for name, value in elements.items():
                if name == "meta":
                    dataset.file_meta.MediaStorageSOPInstanceUID = value
                else:
                    setattr(dataset, name, value)
            dataset.save_as(path)

    def edit_all(self, patient: int = 1, **elements: object) -> None:
        for number in range(1, 5):
            self.edit(number, patient, **elements)

    def found(self, code: str, **settings: str) -> Found:
        """Ingest, run a rule, and return its open flags by a path: the file's, or one of the series'."""
        rule = rulefiles.load()[code]
        with database.open_database(self.url) as db, db.connect() as conn:
            ingest.ingest(db, self.folder, executor=self.threads)
            for name, value in settings.items():
                qa.set_value(db, rule, name, value, reason="as this project has it")
            [self.result] = qa.run(db, rules=[rule]).results
            rows = conn.execute(
                "SELECT coalesce(f.path, (SELECT min(k.path) FROM instance n JOIN image i ON i.instance_id = n.id "
                "JOIN location l ON l.image_id = i.id JOIN file k ON k.id = l.file_id WHERE n.series_id = g.series_id)), "
                "g.severity, g.value, g.detail FROM flag g LEFT JOIN file f ON f.id = g.file_id WHERE g.rule = %s AND g.state = 'open'",
                [code],
            ).fetchall()
        return {str(path): (severity, value, detail) for path, severity, value, detail in rows}


@pytest.fixture
def archive(tmp_path: Path, database_url: str) -> Iterator[Archive]:
    synthetic.write_studies(tmp_path / "a", patients=2, slices=2, phases=2, size=32)
    with ThreadPoolExecutor(1) as threads:
        yield Archive(tmp_path / "a", database_url, threads)


ONE = "dicoms/SYN0001/1.dcm"


def test_missing_file(archive: Archive) -> None:
    """A file that went is flagged with what is lost; one whose image lies in another file is an info; a moved one is none."""
    assert archive.found("FILE-MISSING") == {}
    lost, drawn = archive.image(1), archive.folder / "contourfiles" / "SC-SYN-0001" / "o-contours" / "IM-0001-0001-ocontour-manual.txt"
    shutil.copy(archive.image(2, 2), archive.image(20, 2))
    archive.found("FILE-MISSING")
    lost.rename(archive.folder / "away.dcm_")
    drawn.rename(archive.folder / "away.txt_")
    archive.image(2, 2).unlink()
    shutil.move(archive.image(3, 2), archive.image(30, 2))
    found = archive.found("FILE-MISSING")
    assert found == {
        ONE: ("warning", 1.0, "1 of its 1 image(s) can be read nowhere else"),
        str(drawn.relative_to(archive.folder)): ("warning", 1.0, "it held 1 annotation(s)"),
        "dicoms/SYN0002/2.dcm": ("info", 0.0, "its 1 image(s) are read from other files"),
    }
    (archive.folder / "away.dcm_").rename(lost)
    assert ONE not in archive.found("FILE-MISSING")


def test_truncated_and_without_decoder(archive: Archive) -> None:
    """A file cut by one byte, and one that nothing installed decompresses, are each named by their own rule, beside FILE-UNREADABLE."""
    whole = archive.image(1).read_bytes()
    archive.image(1).write_bytes(whole[:-1])
    other = archive.image(2).read_bytes()
    odd = bytearray(other)  # a transfer syntax of 22 bytes, so the group is two longer
    at = odd.index(b"1.2.840.10008.1.2.1\0")
    odd[at - 2 : at + 20] = (22).to_bytes(2, "little") + b"1.2.840.10008.1.2.4.55"
    odd[140:144] = (int.from_bytes(odd[140:144], "little") + 2).to_bytes(4, "little")
    archive.image(2).write_bytes(odd)
    [(path, (severity, _, detail))] = archive.found("FILE-TRUNCATED").items()
    assert (path, severity) == (ONE, "error") and "2047 bytes where 1 frame(s) of 32×32×1 at 16 bits take 2048" in detail
    [(path, (severity, _, detail))] = archive.found("FILE-NO-DECODER").items()
    assert (path, severity) == ("dicoms/SYN0001/2.dcm", "warning") and detail.startswith("(0002,0010) Transfer Syntax UID is JPEG")
    archive.image(1).write_bytes(whole)
    archive.image(2).write_bytes(other)
    assert archive.found("FILE-TRUNCATED") == archive.found("FILE-NO-DECODER") == {}


def test_pixel_length(archive: Archive) -> None:
    """Surplus bytes are counted a series; not the byte that makes a length even, nor a surplus up to the parameter."""
    assert archive.found("FILE-PIXEL-LENGTH") == {}
    odd = {"Rows": 31, "Columns": 31, "BitsAllocated": 8, "BitsStored": 8, "HighBit": 7, "PixelRepresentation": 0}
    archive.edit(1, 2, **odd, PixelData=bytes(31 * 31 + 1))
    assert archive.found("FILE-PIXEL-LENGTH") == {}
    archive.edit(1, 2, **odd, PixelData=bytes(31 * 31 + 3))
    archive.edit(3, PixelData=bytes(2048 + 16))
    archive.edit(4, PixelData=bytes(3 * 2048))
    assert archive.found("FILE-PIXEL-LENGTH") == {
        ONE: ("warning", 4096.0,
              "2 image file(s), instance number 3, 4: up to 4096 bytes more than the header describes (a frame has 2048)"),
        "dicoms/SYN0002/1.dcm": ("warning", 2.0,
                                 "1 image file(s), instance number 1: up to 2 bytes more than the header describes (a frame has 961)"),
    }  # fmt: skip
    assert set(archive.found("FILE-PIXEL-LENGTH", most_bytes="2")) == {ONE}
    assert archive.found("FILE-PIXEL-LENGTH", most_bytes="4096") == {}


def test_pixel_length_of_a_replaced_file(archive: Archive) -> None:
    """A file that was written again with other pixels is judged by what it holds now."""
    archive.edit(1, PixelData=bytes(2048 + 16))
    assert set(archive.found("FILE-PIXEL-LENGTH")) == {ONE}
    archive.edit(1, PixelData=bytes(range(256)) * 8)
    assert archive.found("FILE-PIXEL-LENGTH") == {}


def test_meta_uid(archive: Archive) -> None:
    """Another UID in front of the file than in its header is counted a series; padding is no difference; corrected, the flag closes."""
    assert archive.found("FILE-META-UID") == {}
    uid = str(dcmread(archive.image(1)).SOPInstanceUID)
    archive.edit(1, meta="1.2.3")
    archive.edit(2, SOPInstanceUID="")
    assert archive.found("FILE-META-UID") == {
        ONE: ("warning", 2.0, "2 file(s), instance number 1, 2: MediaStorageSOPInstanceUID (0002,0003) is not SOPInstanceUID (0008,0018), "
              "which is missing in 1"),
    }  # fmt: skip
    archive.edit(1, meta=uid + (" " if len(uid) % 2 else "  "))
    archive.edit(2, SOPInstanceUID=str(dcmread(archive.image(2)).file_meta.MediaStorageSOPInstanceUID))
    assert archive.found("FILE-META-UID") == {}


UIDS = {
    "1.2.03": "1 with a zero in front of a component",
    "01.2.3": "1 with a zero in front of a component",
    "1.2.00": "1 with a zero in front of a component",
    "1.2.3a": "1 with characters other than digits and dots",
    "1.2 .3": "1 with characters other than digits and dots",
    "1.2.3\n": "1 with characters other than digits and dots",
    "1..3": "1 with an empty component",
    "1.2.3.": "1 with an empty component",
    ".1.2": "1 with an empty component",
    "1." + "2" * 63: "1 longer than 64 characters",
    "1." + "02" * 32: "1 with a zero in front of a component, 1 longer than 64 characters",
    "": "1 missing",
    "1." + "2" * 62: None,
    "1.0.3": None,
    "0.2.30": None,
    "2.25.100": None,
}


def test_invalid_uid(archive: Archive, conn: Conn) -> None:
    """What breaks PS3.5 9.1 is said with how many and how; 64 characters, a component that is 0, and zeros within are right."""
    assert archive.found("UID-INVALID") == {}
    rule = rulefiles.load()["UID-INVALID"]
    with database.open_database(archive.url) as db:
        for uid, words in UIDS.items():
            conn.execute("UPDATE instance SET sop_instance_uid = %s WHERE instance_number = 1 AND series_id = 1", [uid])
            qa.run(db, rules=[rule])
            found = conn.execute("SELECT severity, value, detail FROM flag WHERE rule = 'UID-INVALID' AND state = 'open'").fetchall()
            assert found == ([] if words is None else [("info", 1.0, f"1 of 4 SOPInstanceUIDs: {words}")]), uid


def test_invalid_uids_of_study_and_series(archive: Archive) -> None:
    """They are named, one flag a series; no UID stands in a flag."""
    archive.edit_all(2, StudyInstanceUID="1.02", SeriesInstanceUID="1.x")
    archive.edit(1, 2, SOPInstanceUID="1.2.3.", SeriesInstanceUID="1.x")
    assert archive.found("UID-INVALID") == {
        "dicoms/SYN0002/1.dcm": (
            "info", 3.0, "the StudyInstanceUID, the SeriesInstanceUID, 1 of 4 SOPInstanceUIDs: 1 with a zero in front of a component, "
            "1 with characters other than digits and dots, 1 with an empty component"),
    }  # fmt: skip


def test_burned_in(archive: Archive) -> None:
    """YES is a warning, an error where the project says there is none; NO is right, and what does not say is not evaluated."""
    archive.edit(1, BurnedInAnnotation="YES")
    archive.edit_all(2, BurnedInAnnotation="NO")
    told = "BurnedInAnnotation (0028,0301) is YES in 1 object(s)"
    assert archive.found("PRIVACY-BURNED-IN") == {ONE: ("warning", 1.0, told)}
    assert archive.result.not_evaluated == 3
    assert archive.found("PRIVACY-BURNED-IN", expected_clean="true") == {ONE: ("error", 1.0, told)}
    archive.edit(1, BurnedInAnnotation="NO")
    assert archive.found("PRIVACY-BURNED-IN") == {}


def test_identity_not_removed(archive: Archive) -> None:
    """NO or nothing is an info, an error where the project says that all are de-identified; YES is right."""
    archive.edit_all(1, PatientIdentityRemoved="YES")
    archive.edit_all(2, PatientIdentityRemoved="YES")
    assert archive.found("PRIVACY-NOT-REMOVED") == {}
    archive.edit(1, PatientIdentityRemoved="NO")
    archive.edit(2, PatientIdentityRemoved="")
    told = "PatientIdentityRemoved (0012,0062) is NO in 1 object(s), missing or something else in 1"
    assert archive.found("PRIVACY-NOT-REMOVED") == {ONE: ("info", 2.0, told)}
    assert archive.found("PRIVACY-NOT-REMOVED", expected_clean="true") == {ONE: ("error", 2.0, told)}


def test_identifying_attributes(archive: Archive, conn: Conn) -> None:
    """Tags are named with how often, values nowhere; blanks and what is allowed are none; emptied in place, the flag closes."""
    assert archive.found("PRIVACY-IDENTIFYING") == {}  # its PatientName is SYN0001, as its PatientID
    archive.edit_all(2, PatientName="Anonymous^^^", PatientBirthDate="00000000", AccessionNumber="0000", InstitutionName="  ")
    assert archive.found("PRIVACY-IDENTIFYING") == {}
    archive.edit(1, PatientName="Quux^Zyx", StationName="ZYXST")
    archive.edit(2, PatientName="Quux^Zyx")
    told = "StationName (0008,1010) in 1 object(s), PatientName (0010,0010) in 2 object(s)"
    assert archive.found("PRIVACY-IDENTIFYING") == {ONE: ("info", 2.0, told)}
    assert archive.found("PRIVACY-IDENTIFYING", allowed="(0008,1010)") == {ONE: ("info", 1.0, "PatientName (0010,0010) in 2 object(s)")}
    assert archive.found("PRIVACY-IDENTIFYING", expected_clean="true")[ONE][0] == "error"
    tables = [name for (name,) in conn.execute("SELECT tablename FROM pg_tables WHERE schemaname = current_schema()")]
    for table in tables:
        assert not re.search("quux|zyx", str(conn.execute(f"SELECT * FROM {table}").fetchall()), re.IGNORECASE), table
    archive.edit(1, PatientName="", StationName="")
    archive.edit(2, PatientName="SYN0001")
    assert archive.found("PRIVACY-IDENTIFYING") == {}


def test_names_of_attributes() -> None:
    """The rule's names of tags, and the VRs by which headers are read, are the standard's."""
    query = rulefiles.load()["PRIVACY-IDENTIFYING"].query
    assert dict(re.findall(r"\('(\([0-9A-F,]+\))', '(\w+)'\)", query)) == {
        privacy._NAMED[tag]: keyword_for_tag(tag) for tag in privacy.TAGS
    }
    assert {tag: vr for vr, tags in privacy.BY_VR.items() for tag in tags} == {tag: dictionary_VR(tag) for tag in privacy.TAGS}


@pytest.mark.parametrize(
    ("age", "birth", "study", "over"),
    [
        ("090Y", "", "", True),
        ("089Y", "", "", False),
        ("90Y ", "", "", True),
        ("999M", "", "", False),
        ("", "19220101", "20120101", True),
        ("", "19220102", "20120101", False),
        ("", "1922.01.01", "20120101", True),
        ("", "19220615", "20120000", True),
        ("", "19230101", "20120000", False),
        ("060Y", "19100101", "20120101", True),
        ("", "00000000", "20120000", None),
        ("", "19000101", "20120101", None),
        ("", "20130101", "20120101", None),
        ("", "18500101", "20120101", None),
        ("90", "x", "20120101", None),
        ("", "19220101", "", None),
    ],
)
def test_age_over_89(age: str, birth: str, study: str, over: bool | None) -> None:
    """By the age, or by two dates to the day; what is no date, in the future or beyond 150 years says nothing."""
    values = {privacy.AGE: age.encode(), privacy.BIRTH_DATE: birth.encode(), privacy.STUDY_DATE: study.encode()}
    assert privacy.told(tuple(values.get(tag) for tag in privacy.ASKED))[1] is over


def test_old_patient(archive: Archive) -> None:
    """90 years is an info, an error where the project expects none; 89 is none."""
    archive.edit_all(2, PatientAge="089Y")
    archive.edit(1, PatientBirthDate="19220101", StudyDate="20120101")
    told = "1 object(s) say that the patient is 90 years or older"
    assert archive.found("PRIVACY-AGE") == {ONE: ("info", 1.0, told)}
    assert archive.result.not_evaluated == 3
    assert archive.found("PRIVACY-AGE", expected_clean="true") == {ONE: ("error", 1.0, told)}


PATHS = {
    "Doe^Jane": "what looks like a name",
    "Müller, Anna": "what looks like a name",
    "O'Neill,Tim": "what looks like a name",
    "MRN-0012345": "a labelled number",
    "DOB 19510203": "a labelled number, a date 5 or more years before the study",
    "x 078-05-1120": "what looks like a social security number",
    "jane@example.org": "what looks like an e-mail address",
    "SYN 19510203": "a date 5 or more years before the study",
    "SYN_03.02.1951": "a date 5 or more years before the study",
    "20120101/1951-02-03": "a date 5 or more years before the study",
    "SYN 20070102": "a date 5 or more years before the study",
    "SYN 20080102": None,
    "20120101": None,
    "1.2.840.19510203.7": None,
    "unborn 12": None,
    "reborn12345": None,
    "a@b": None,
    "T1, T2": None,
    "2078-05-11203": None,
    "birthday": None,
    "19511303": None,
}


def test_path(archive: Archive, conn: Conn) -> None:
    """What looks like a person in a path is said by its kind, never repeated; dates of the study, UIDs and the like are none."""
    assert archive.found("PRIVACY-PATH") == {}
    rule = rulefiles.load()["PRIVACY-PATH"]
    conn.execute("UPDATE study SET study_date = '20120101'")
    with database.open_database(archive.url) as db:
        for name, words in PATHS.items():
            conn.execute("UPDATE file SET path = %s WHERE id = (SELECT min(file_id) FROM location)", [f"{name}/1.dcm"])
            qa.run(db, rules=[rule])
            found = conn.execute("SELECT severity, detail FROM flag WHERE rule = 'PRIVACY-PATH' AND state = 'open'").fetchall()
            assert found == ([] if words is None else [("info", f"1 file(s) with {words} in the path")]), name
        conn.execute("UPDATE file SET path = 'Doe^Jane/1.dcm' WHERE path LIKE '%/1.dcm' AND id = (SELECT min(file_id) FROM location)")
        qa.set_value(db, rule, "expected_clean", "true", reason="de-identified")
        qa.run(db, rules=[rule])
        assert conn.execute("SELECT severity FROM flag WHERE rule = 'PRIVACY-PATH' AND state = 'open'").fetchall() == [("error",)]


def test_path_with_a_patients_own_name(archive: Archive) -> None:
    """PatientID in a path counts where the project says that it is a real one, in contour files as well."""
    assert archive.found("PRIVACY-PATH") == {}
    found = archive.found("PRIVACY-PATH", patient_id="true")
    assert {detail for _, _, detail in found.values()} == {"10 file(s) with the name of its patient in the path"}


def test_ingested_before_anyone_looked(archive: Archive, conn: Conn) -> None:
    """What an earlier version took in is counted as not evaluated, not as clean."""
    archive.found("PRIVACY-IDENTIFYING")
    assert archive.result.not_evaluated == 0
    conn.execute("UPDATE instance SET identifying = NULL")
    for code in ("PRIVACY-IDENTIFYING", "FILE-META-UID", "FILE-PIXEL-LENGTH"):
        assert archive.found(code) == {}
        assert archive.result.not_evaluated == 8


def test_object_without_images(archive: Archive, tmp_path: Path) -> None:
    """A plan or a report has a header, too: it is looked at, and corrected in place it is right."""
    path = archive.folder / "dicoms" / "SYN0001" / "9.dcm"
    dataset = dcmread(archive.image(1))
    for name in ("PixelData", "BitsAllocated", "Rows", "Columns"):
        delattr(dataset, name)
    with config.disable_value_validation():
        dataset.SOPClassUID, dataset.SOPInstanceUID, dataset.SeriesInstanceUID = "1.2.840.10008.5.1.4.1.1.88.11", "1.2.07", "1.2.7"
    dataset.PatientAge, dataset.OperatorsName = "095Y", "Quux"
    dataset.save_as(path)
    assert {detail for _, _, detail in archive.found("FILE-META-UID").values()} == {
        "1 file(s), instance number 1: MediaStorageSOPInstanceUID (0002,0003) is not SOPInstanceUID (0008,0018)"
    }
    assert [detail for _, _, detail in archive.found("UID-INVALID").values()] == [
        "1 of 1 SOPInstanceUIDs: 1 with a zero in front of a component"
    ]
    assert len(archive.found("PRIVACY-AGE")) == len(archive.found("PRIVACY-IDENTIFYING")) == 1
    dataset.PatientAge, dataset.OperatorsName = "", ""
    dataset.save_as(path)
    assert archive.found("PRIVACY-AGE") == archive.found("PRIVACY-IDENTIFYING") == {}


def test_real_studies(sunnybrook: Path, database_url: str, conn: Conn) -> None:
    """262 of 500 SOPInstanceUIDs, and study and series UID of one study, are named as info; nothing of these groups is an error."""
    with database.open_database(database_url) as db, ThreadPoolExecutor(1) as threads:
        ingest.ingest(db, sunnybrook, executor=threads, hashing="none")
        rules = [rule for code, rule in rulefiles.load().items() if re.match("FILE-|UID-|PRIVACY-", code)]
        summary = qa.run(db, rules=rules)
    found = conn.execute("SELECT g.rule, g.severity, g.detail FROM flag g ORDER BY g.rule, g.series_id").fetchall()
    assert {severity for _, severity, _ in found} == {"info"}
    assert [detail for rule, _, detail in found if rule == "UID-INVALID"] == [
        "the StudyInstanceUID, the SeriesInstanceUID, 116 of 240 SOPInstanceUIDs: 118 with a zero in front of a component",
        "146 of 260 SOPInstanceUIDs: 146 with a zero in front of a component",
    ]
    assert {rule for rule, *_ in found} == {"UID-INVALID", "PRIVACY-IDENTIFYING", "PRIVACY-NOT-REMOVED"}
    assert {one.rule: one.not_evaluated for one in summary.results if one.not_evaluated} == {"PRIVACY-AGE": 500, "PRIVACY-BURNED-IN": 500}
