"""OpenSSF Model Signing (specification 1.0): signatures by elliptic-curve keys, as `model_signing` writes them.

A signature is a Sigstore bundle (JSON) whose DSSE envelope holds an in-toto statement: the SHA-256 of every file of the
signed folder. https://github.com/ossf/model-signing-spec, https://github.com/secure-systems-lab/dsse
"""

from __future__ import annotations

import base64
import binascii
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from satchel.runtime.bundle import strict_json
from satchel.runtime.bundle.errors import BundleError
from satchel.runtime.bundle.hash_cache import sha256_of

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey, EllipticCurvePublicKey

OMS_NAME = "model.sig"
MEDIA_TYPE = "application/vnd.dev.sigstore.bundle.v0.3+json"
PAYLOAD_TYPE = "application/vnd.in-toto+json"
STATEMENT_TYPE = "https://in-toto.io/Statement/v1"
PREDICATE_TYPE = "https://model_signing/signature/v1.0"

ALWAYS_IGNORED = (".git", ".gitattributes", ".github", ".gitignore")
"""What `model_signing` never signs."""

CURVES = {"secp256r1": "SHA256", "secp384r1": "SHA384", "secp521r1": "SHA512"}
"""The hash that goes with each curve."""


def sign_files(name: str, digests: Mapping[str, str], ignored: tuple[str, ...], key: EllipticCurvePrivateKey) -> bytes:
    """Sign files, given as SHA-256 (64 hex digits) by path in the folder `name`. Returns the content of model.sig.

    `ignored` are paths of the folder that are not signed.
    """
    resources = [{"name": path, "algorithm": "sha256", "digest": digests[path]} for path in sorted(digests)]
    statement = {
        "_type": STATEMENT_TYPE,
        "subject": [{"name": name, "digest": {"sha256": _digest_of_all([digests[path] for path in sorted(digests)])}}],
        "predicateType": PREDICATE_TYPE,
        "predicate": {
            "serialization": {
                "method": "files",
                "hash_type": "sha256",
                "allow_symlinks": False,
                "ignore_paths": sorted({*ALWAYS_IGNORED, *ignored}),
            },
            "resources": resources,
        },
    }
    payload = json.dumps(statement, indent=2).encode("ascii")
    signature = key.sign(_signed_bytes(payload), _algorithm(key))
    document = {
        "mediaType": MEDIA_TYPE,
        "verificationMaterial": {
            "publicKey": {"hint": sha256_of_bytes(_pem(key.public_key()))},
            "tlogEntries": [],
        },
        "dsseEnvelope": {
            "payload": base64.b64encode(payload).decode("ascii"),
            "payloadType": PAYLOAD_TYPE,
            "signatures": [{"sig": base64.b64encode(signature).decode("ascii"), "keyid": ""}],
        },
    }
    return (json.dumps(document, indent=2) + "\n").encode("ascii")


def signed_files(content: bytes, name: str, key: EllipticCurvePublicKey) -> tuple[dict[str, str], tuple[str, ...]]:
    """The SHA-256 of every signed file by its path, and the paths that are ignored, of a signature by `key`.

    `content` is that of the signature file `name`. Raises BundleError if it is no such signature, is of another key, or
    does not match what it signs.
    """
    try:
        payload, signature, hint = _open_envelope(strict_json.loads(content))
        if hint and hint != sha256_of_bytes(_pem(key)):
            raise BundleError(f"{name}: signed with another key: do not trust it, or give the public key of its maker")
        if not _holds(key, signature, payload):
            raise BundleError(f"{name}: its signature does not match its content: do not trust it")
        return _open_statement(strict_json.loads(payload))
    except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        found = f"no {error}" if isinstance(error, KeyError) else str(error)
        raise BundleError(f"{name}: not a model signature that this satchel can read ({found}): sign again") from None


def check_files(folder: Path, signed: Mapping[str, str], ignored: tuple[str, ...], known: Mapping[str, str]) -> None:
    """Check that a folder, or a packed file, has the signed files and no others, with the signed content.

    `known` are the SHA-256 of the bundle's own files, which are checked elsewhere. Raises BundleError.
    """
    unsigned = sorted(known.keys() - signed.keys())
    if unsigned:
        raise BundleError(f"{folder}: {unsigned[0]} is not signed: do not trust it, or sign the bundle again")
    for path, digest in signed.items():
        if (known.get(path) or _digest_on_disk(folder, path)) != digest:
            raise BundleError(f"{folder / path}: changed since the bundle was signed: do not trust it")
    for path in _files_in(folder, ignored):
        if path not in signed:
            raise BundleError(f"{folder / path}: was added after the bundle was signed: remove it, or sign again")


def files_to_sign(folder: Path, ignored: tuple[str, ...], known: Mapping[str, str]) -> dict[str, str]:
    """The SHA-256 of each file in a folder, but for ignored ones; those of `known` are not read again."""
    found = {path: known.get(path) or _digest_on_disk(folder, path) for path in _files_in(folder, ignored)}
    return {**known, **found}


def _files_in(folder: Path, ignored: tuple[str, ...]) -> list[str]:
    """The files in a folder, by path; none of a packed file. A link is not signed, so it is not there."""
    skipped = {PurePosixPath(path) for path in (*ALWAYS_IGNORED, *ignored)}
    paths = [path.relative_to(folder) for path in folder.rglob("*") if path.is_file() or path.is_symlink()]
    return sorted(path.as_posix() for path in paths if skipped.isdisjoint({path, *path.parents}))


def _digest_on_disk(folder: Path, path: str) -> str:
    parts = PurePosixPath(path)
    place = folder / path
    if parts.is_absolute() or ".." in parts.parts or not place.is_file() or _has_link(folder, place):
        raise BundleError(f"{place}: is signed, but is no regular file of this bundle: do not trust it")
    try:
        return sha256_of(place, lambda _: None)
    except OSError as error:
        raise BundleError(f"{place}: cannot be read ({error.strerror}): check its permissions") from None


def _has_link(folder: Path, place: Path) -> bool:
    return any(
        os.path.islink(each) for each in (place, *place.parents) if each.is_relative_to(folder) and each != folder
    )


def _open_envelope(document: Any) -> tuple[bytes, bytes, str]:
    """The payload, its signature and the hint of the key. Raises ValueError or KeyError."""
    material = document["verificationMaterial"]
    if "publicKey" not in material:
        kinds = [kind for kind in ("certificate", "x509CertificateChain") if kind in material]
        raise ValueError(f"it is by {kinds[0] if kinds else 'no key'}, not by a key")
    envelope = document["dsseEnvelope"]
    if envelope["payloadType"] != PAYLOAD_TYPE:
        raise ValueError(f"payload type {envelope['payloadType']!r}")
    (signature,) = envelope["signatures"]
    decode = binascii.a2b_base64
    return (
        decode(envelope["payload"], strict_mode=True),
        decode(signature["sig"], strict_mode=True),
        str(material["publicKey"].get("hint", "")),
    )


def _open_statement(statement: Any) -> tuple[dict[str, str], tuple[str, ...]]:
    """The digests by path and the ignored paths. Raises ValueError or KeyError."""
    for key, value in (("_type", STATEMENT_TYPE), ("predicateType", PREDICATE_TYPE)):
        if statement[key] != value:
            raise ValueError(f"{key} is {statement[key]!r}, not {value}")
    predicate = statement["predicate"]
    form, resources = predicate["serialization"], predicate["resources"]
    if (form["method"], form["hash_type"]) != ("files", "sha256"):
        raise ValueError(f"{form['hash_type']} of {form['method']}, and satchel reads sha256 of files")
    if any(each["algorithm"] != "sha256" for each in resources):
        raise ValueError("a digest that is not sha256")
    signed = {each["name"]: each["digest"] for each in resources}
    (subject,) = statement["subject"]
    if len(signed) != len(resources) or subject["digest"]["sha256"] != _digest_of_all(list(signed.values())):
        raise ValueError("the digest of all files is not that of the files listed")
    return signed, tuple(str(path) for path in form.get("ignore_paths", ()))


def _digest_of_all(digests: list[str]) -> str:
    return sha256_of_bytes(b"".join(map(bytes.fromhex, digests)))


def sha256_of_bytes(content: bytes) -> str:
    """The SHA-256 of bytes, as 64 hex digits."""
    import hashlib  # as in hash_cache

    return hashlib.sha256(content).hexdigest()


def _signed_bytes(payload: bytes) -> bytes:
    """The pre-authentication encoding of DSSE."""
    kind = PAYLOAD_TYPE.encode("ascii")
    return b"DSSEv1 %d %b %d %b" % (len(kind), kind, len(payload), payload)


def _holds(key: EllipticCurvePublicKey, signature: bytes, payload: bytes) -> bool:
    from cryptography.exceptions import InvalidSignature

    try:
        key.verify(signature, _signed_bytes(payload), _algorithm(key))
    except InvalidSignature:
        return False
    return True


def _algorithm(key: EllipticCurvePrivateKey | EllipticCurvePublicKey) -> Any:
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric.ec import ECDSA

    make: Callable[[], Any] = getattr(hashes, CURVES[key.curve.name])
    return ECDSA(make())


def _pem(key: EllipticCurvePublicKey) -> bytes:
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

    return key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
