"""What of a header tells who the patient is: the tags that do, and whether the patient is older than 89. No value leaves this file.

Both ways to read a header (`catalog.header`, `catalog.dicom`) ask here with the bytes as they lie in the file, so that they agree.
"""

from __future__ import annotations

import re
from functools import lru_cache

PATIENT_NAME, PATIENT_ID, BIRTH_DATE = 0x00100010, 0x00100020, 0x00100030
# Of the attributes that PS3.15 Table E.1-1 says to empty or remove (Basic Profile: Z, X, or one of them with D), those that name a person,
# a number under which they are kept, a place or a device to find them by. What describes a patient, which the option Retain Patient
# Characteristics keeps (age, sex, size, weight, ethnic group), is not here; nor are dates of the study, free descriptions, UIDs and
# sequences. PatientID is not, either: each patient has one, and a catalog keeps it.
BY_VR = {
    "SH": (
        0x00080050,  # AccessionNumber: Z
        0x00080094,  # ReferringPhysicianTelephoneNumbers: X
        0x00081010,  # StationName: X/Z/D
        0x00102154,  # PatientTelephoneNumbers: X
    ),
    "LO": (
        0x00080080,  # InstitutionName: X/Z/D
        0x00081040,  # InstitutionalDepartmentName: X
        0x00101000,  # OtherPatientIDs: X
        0x00101040,  # PatientAddress: X
        0x00101080,  # MilitaryRank: X
        0x00101090,  # MedicalRecordLocator: X
        0x00181000,  # DeviceSerialNumber: X/Z/D
        0x00380300,  # CurrentPatientLocation: X
        0x00380400,  # PatientInstitutionResidence: X
    ),
    "ST": (
        0x00080081,  # InstitutionAddress: X
        0x00080092,  # ReferringPhysicianAddress: X
    ),
    "LT": (0x00104000,),  # PatientComments: X
    "PN": (
        0x00080090,  # ReferringPhysicianName: Z
        0x00081048,  # PhysiciansOfRecord: X
        0x00081050,  # PerformingPhysicianName: X
        0x00081060,  # NameOfPhysiciansReadingStudy: X
        0x00081070,  # OperatorsName: X/Z/D
        PATIENT_NAME,  # Z
        0x00101001,  # OtherPatientNames: X
        0x00101005,  # PatientBirthName: X
        0x00101060,  # PatientMotherBirthName: X
        0x00321032,  # RequestingPhysician: X
    ),
    "DA": (BIRTH_DATE,),  # Z
    "TM": (0x00100032,),  # PatientBirthTime: X
}
TAGS = tuple(sorted(tag for tags in BY_VR.values() for tag in tags))
AGE, STUDY_DATE = 0x00101010, 0x00080020
ASKED = (*TAGS, PATIENT_ID, AGE, STUDY_DATE)  # what `told` wants to know

_NAMED = {tag: f"({tag >> 16:04X},{tag & 0xFFFF:04X})" for tag in TAGS}
# What programs write in place of a value that they took away or never had.
_NOTHING = frozenset(
    b"anon anonym anonymous anonymized anonymised deidentified de-identified deleted empty missing n/a na name no noname none null patient "
    b"redacted removed subject unknown unnamed unspecified".split()
)
_FILLING = b"0*x-?._:/"
_PARTS = re.compile(rb"[\0\s^=\\]+")
_YEARS = re.compile(rb"(\d{1,3})([DWMYdwmy])")
_OLDEST = 150  # years; beyond it a date is no date of birth
_NO_BIRTH = (b"19000101", b"1900.01.01")


@lru_cache(16)  # the files of a study say all the same
def told(values: tuple[bytes | None, ...]) -> tuple[tuple[str, ...], bool | None]:
    """Return the tags, such as (0010,0010), of the attributes of `TAGS` that have a value, ascending; and whether the patient is over 89.

    No value is one that is empty, of zeros or the like, or a word such as Anonymous. Nor is a patient's name that repeats a PatientID
    with a digit in it: de-identified archives put their own number in both.

    Over 89 is who is 90 years or older by PatientAge, or by StudyDate less PatientBirthDate; None where neither says. Where a date holds a
    year and no day (20120000), the patient is taken for as old as can be. A birth on the first day of 1900 is what systems write that
    know none.

    Args:
        values: Of the elements `ASKED`, as the bytes lie in the file; None where an element is missing.
    """
    found = {tag: value or b"" for tag, value in zip(ASKED, values, strict=True)}
    name = found[PATIENT_NAME].strip(b"\0 ^")
    pseudonym = name == found[PATIENT_ID].strip(b"\0 ^") and any(48 <= byte <= 57 for byte in name)
    identifying = tuple(_NAMED[tag] for tag in TAGS if not _blank(found[tag]) and not (tag == PATIENT_NAME and pseudonym))
    return identifying, _over_89(found[AGE], found[BIRTH_DATE], found[STUDY_DATE])


def _blank(value: bytes) -> bool:
    if not value or value.strip(b"\0 ") in _NO_BIRTH:
        return True
    return all(part in _NOTHING or not part.strip(_FILLING) for part in _PARTS.split(value.lower()))


def _over_89(age: bytes, birth: bytes, study: bytes) -> bool | None:
    said = []
    if match := _YEARS.fullmatch(age.strip(b"\0 ")):
        said.append(match[2] in b"Yy" and int(match[1]) > 89)
    born, then = _date(birth), _date(study)
    if born is not None and then is not None:
        years = (then + (0 if then % 10_000 else 1231) - born) // 10_000
        if 0 <= years <= _OLDEST:
            said.append(years > 89)
    return any(said) if said else None


def _date(value: bytes) -> int | None:
    """Return a DA value as a number, YYYYMMDD; None where it is no date."""
    digits = value.strip(b"\0 ").replace(b".", b"")  # YYYY.MM.DD is how ACR-NEMA wrote it
    if len(digits) != 8 or not digits.isdigit() or value.strip(b"\0 ") in _NO_BIRTH:
        return None
    return int(digits) if digits >= b"18" else None
