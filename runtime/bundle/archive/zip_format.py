"""The records of a zip file, as bytes: those that a packed bundle has, and no others.

Field by field as in PKWARE's APPNOTE.TXT 6.3.10, sections 4.3 and 4.5.3 (Zip64).
"""

from __future__ import annotations

import struct

LOCAL = struct.Struct("<4sHHHHHIIIHH")
CENTRAL = struct.Struct("<4sHHHHHHIIIHHHHHII")
END = struct.Struct("<4sHHHHIIH")
END_64 = struct.Struct("<4sQHHIIQQQQ")
LOCATOR_64 = struct.Struct("<4sIQI")
EXTRA = struct.Struct("<HH")

LOCAL_MAGIC, CENTRAL_MAGIC, END_MAGIC = b"PK\x03\x04", b"PK\x01\x02", b"PK\x05\x06"
END_64_MAGIC, LOCATOR_64_MAGIC = b"PK\x06\x06", b"PK\x06\x07"

STORED = 0
UTF8 = 0x800
"""The flag that says that a name is UTF-8."""

MANY, LARGE = 0xFFFF, 0xFFFFFFFF
"""What stands where a number is too large for its field, and is in the Zip64 field instead."""

VERSION, VERSION_64 = 20, 45
UNIX = 3 << 8
ZIP_64, ALIGNMENT = 0x0001, 0xD935
"""Kinds of extra fields: larger numbers, and padding in front of the data (as Android's zipalign writes it)."""

DOS_TIME, DOS_DATE = 0, 0x21
"""1 January 1980, the first day that a zip file knows: the same bundle gives the same bytes whenever it is packed."""
