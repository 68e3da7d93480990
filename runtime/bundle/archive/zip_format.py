"""The binary records of the zip format that a packed bundle uses.

The fields are those of PKWARE's APPNOTE.TXT 6.3.10, sections 4.3 and 4.5.3 (Zip64).
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
"""The flag for UTF-8 names."""

MANY, LARGE = 0xFFFF, 0xFFFFFFFF
"""Placeholders for numbers that are too large for their field and stored in the Zip64 field."""

VERSION, VERSION_64 = 20, 45
UNIX = 3 << 8
ZIP_64, ALIGNMENT = 0x0001, 0xD935
"""Kinds of extra fields: larger numbers, and padding in front of the data (as Android's zipalign writes it)."""

DOS_TIME, DOS_DATE = 0, 0x21
"""1 January 1980, the earliest date of the format: a fixed time makes packing reproducible."""
