"""Signatures of bundles: by Ed25519 keys over the digest, which covers everything except specialized graphs, or by
elliptic-curve keys over all files (`satchel.runtime.bundle.oms`). The key that is given says which."""

from __future__ import annotations

import binascii
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from satchel.runtime.bundle import oms, strict_json
from satchel.runtime.bundle.archive.span import Span
from satchel.runtime.bundle.atomic_write import atomic_write
from satchel.runtime.bundle.errors import BundleError, SatchelError
from satchel.runtime.bundle.limits import LIMITS

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePublicKey
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

FORMAT, VERSION, ALGORITHM = "satchel-signature", 1, "ed25519"
SIGNATURE_NAME, MANIFEST_NAME = "signature.json", "manifest.json"

FORMATS = ("satchel", "oms")
"""What `sign` writes: signature.json with an Ed25519 key, or model.sig of OpenSSF Model Signing with a P-256 key."""

DOMAIN = b"satchel bundle digest, version 1\0"
"""The prefix of a signed message (domain separation): a signature of anything else is never valid for a bundle."""

KEY_BYTES = 1 << 16
"""The maximum bytes to read from a key file."""

PRIVATE_MODE = 0o600


def signed_message(digest: str) -> bytes:
    """The bytes to sign: `DOMAIN` and the 32 bytes of the digest."""
    return DOMAIN + bytes.fromhex(digest)


def sign(digest: str, key: Path) -> bytes:
    """Sign a digest of 64 hex digits with the private key in a PEM file. Returns the content of signature.json.

    Raises SatchelError if the key cannot be read or is not an Ed25519 key.
    """
    private = _private_key(key, "satchel")
    document = {
        "format": FORMAT,
        "version": VERSION,
        "algorithm": ALGORITHM,
        "digest": digest,
        "public_key": private.public_key().public_bytes_raw().hex(),
        "signature": private.sign(signed_message(digest)).hex(),
    }
    return (json.dumps(document, indent=1) + "\n").encode("ascii")


def sign_files(folder: Path, known: Mapping[str, str], key: Path) -> bytes:
    """Sign the files of a bundle with the private key in a PEM file. Returns the content of model.sig.

    `folder` is the bundle, a folder or a packed file; `known` are the SHA-256 of manifest.json and of the files that it
    lists. Raises SatchelError if the key cannot be read or is not one of a curve P-256, P-384 or P-521.
    """
    private, ignored = _private_key(key, "oms"), (SIGNATURE_NAME, oms.OMS_NAME)
    return oms.sign_files(folder.resolve().name, oms.files_to_sign(folder, ignored, known), ignored, private)


def check_signature(
    bundle: Path, beside: Callable[[str], Span | None], digest: str, key: Path
) -> Callable[[Mapping[str, str]], None]:
    """Check that a bundle's manifest is signed with the private key that belongs to the public key in a PEM file.

    `beside` gives the span of manifest.json or of a signature, None where there is none; `digest` is the manifest's.
    Returns what checks the files: a function of the SHA-256 of manifest.json and of the files that it lists. Raises
    SatchelError if the key cannot be read or is of another kind, and BundleError if the bundle is not signed, is signed
    with another key, or has an invalid signature.
    """
    public = _public_key(key)
    of_files = _is_elliptic(public)
    name = oms.OMS_NAME if of_files else SIGNATURE_NAME
    signature = beside(name)
    if signature is None:
        raise BundleError(f"{bundle}: not signed (no {name}), and --require-signature {key} requires it: do not use it")
    content = _read(bundle / name, signature)
    if of_files:
        return _check_files_later(bundle, content, beside, public)
    found = _read_signature(f"{bundle / name}", content)
    if found["public_key"] != public.public_bytes_raw().hex():
        raise BundleError(
            f"{bundle}: signed with another key ({found['public_key'][:16]}...) than {key}: "
            "do not trust it, or give the public key of its maker"
        )
    if found["digest"] != digest or not _holds(public, found["signature"], digest):
        raise BundleError(f"{bundle}: its signature does not match its content: do not trust it")
    return lambda _: None  # the digest covers them


def _check_files_later(
    bundle: Path, content: bytes, beside: Callable[[str], Span | None], public: EllipticCurvePublicKey
) -> Callable[[Mapping[str, str]], None]:
    signed, ignored = oms.signed_files(content, f"{bundle / oms.OMS_NAME}", public)
    manifest = beside(MANIFEST_NAME)
    if manifest is None or signed.get(MANIFEST_NAME) != oms.sha256_of_bytes(manifest.read()):
        raise BundleError(f"{bundle / MANIFEST_NAME}: changed since the bundle was signed: do not trust it")
    return lambda known: oms.check_files(bundle, signed, (*ignored, SIGNATURE_NAME, oms.OMS_NAME), known)


def new_key_pair(name: Path, form: str = "satchel") -> tuple[Path, Path]:
    """Create a key pair for one of `FORMATS`: NAME.pem (private, readable by its owner only) and NAME.pub.

    Raises SatchelError if one of the files exists or cannot be written.
    """
    ec, ed25519, serialization = _cryptography()
    private_file, public_file = (name.with_name(f"{name.name}.{suffix}") for suffix in ("pem", "pub"))
    for path in (private_file, public_file):
        if os.path.lexists(path):
            raise SatchelError(f"--new-key {name}: {path} already exists: choose another name, or remove it")
    private = ec.generate_private_key(ec.SECP256R1()) if form == "oms" else ed25519.Ed25519PrivateKey.generate()
    pem, plain = serialization.Encoding.PEM, serialization.NoEncryption()
    secret = private.private_bytes(pem, serialization.PrivateFormat.PKCS8, plain)
    public = private.public_key().public_bytes(pem, serialization.PublicFormat.SubjectPublicKeyInfo)
    try:
        descriptor = os.open(private_file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, PRIVATE_MODE)
        with open(descriptor, "wb") as file:
            file.write(secret)
    except OSError as error:
        raise SatchelError(
            f"--new-key {name}: {private_file} cannot be written ({error.strerror}): choose another name"
        ) from None
    atomic_write(public_file, public, "--new-key")
    return private_file, public_file


def _read(name: Path, span: Span) -> bytes:
    if span.length > LIMITS[f"{name.name} bytes"].most:
        raise BundleError(f"{name}: exceeds the limit for signatures: do not trust this bundle")
    try:
        return span.read()
    except OSError as error:
        raise BundleError(f"{name}: cannot be read ({error.strerror}): check its permissions") from None


def _read_signature(name: str, content: bytes) -> dict[str, str]:
    try:
        document = strict_json.loads(content)
    except ValueError as error:
        raise BundleError(f"{name}: not valid JSON ({error}): sign the bundle again") from None
    fixed = {"format": FORMAT, "version": VERSION, "algorithm": ALGORITHM}
    texts = ("digest", "public_key", "signature")
    well_formed = (
        isinstance(document, dict)
        and document.keys() == {*fixed, *texts}
        and all(document[key] == value and type(document[key]) is type(value) for key, value in fixed.items())
        and all(isinstance(document[key], str) for key in texts)
    )
    if not well_formed:
        raise BundleError(f"{name}: not a signature that this satchel can read: sign the bundle again")
    return {key: document[key] for key in texts}


def _holds(public: Ed25519PublicKey, signature: str, digest: str) -> bool:
    from cryptography.exceptions import InvalidSignature

    try:
        public.verify(binascii.unhexlify(signature), signed_message(digest))
    except (InvalidSignature, ValueError):
        return False
    return True


def _private_key(path: Path, form: str) -> Any:
    """The private key of a file, of the kind that goes with one of `FORMATS`."""
    _, ed25519, serialization = _cryptography()
    made = f"create one with satchel sign --new-key NAME --format {form}"
    try:
        key = serialization.load_pem_private_key(_key_file(path, "--key"), password=None)
    except _key_errors():
        raise SatchelError(f"--key {path}: not a PEM private key without a password: {made}") from None
    if form == "oms" and not _is_elliptic(key):
        raise SatchelError(f"--key {path}: not a key of a curve P-256, P-384 or P-521, as --format oms needs: {made}")
    if form == "satchel" and not isinstance(key, ed25519.Ed25519PrivateKey):
        raise SatchelError(f"--key {path}: not an Ed25519 key: {made}, or give --format oms with a key of a P curve")
    return key


def _public_key(path: Path) -> Any:
    _, ed25519, serialization = _cryptography()
    content = _key_file(path, "--require-signature")
    try:
        key = serialization.load_pem_public_key(content)
    except _key_errors():
        raise SatchelError(
            f"--require-signature {path}: not a PEM public key: give the .pub file of satchel sign --new-key"
        ) from None
    if not isinstance(key, ed25519.Ed25519PublicKey) and not _is_elliptic(key):
        raise SatchelError(
            f"--require-signature {path}: neither an Ed25519 key nor one of a curve P-256, P-384 or P-521: "
            "give the .pub file of satchel sign --new-key"
        )
    return key


def _is_elliptic(key: Any) -> bool:
    """Whether a key, private or public, is one that OpenSSF Model Signing knows."""
    ec, _, _ = _cryptography()
    kinds = (ec.EllipticCurvePrivateKey, ec.EllipticCurvePublicKey)
    return isinstance(key, kinds) and key.curve.name in oms.CURVES


def _key_file(path: Path, option: str) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(KEY_BYTES)
    except OSError as error:
        raise SatchelError(f"{option} {path}: cannot be read ({error.strerror}): give a key file") from None


def _key_errors() -> tuple[type[Exception], ...]:
    """The exceptions for a file without a key, with an encrypted key, or with one of an unknown type."""
    from cryptography.exceptions import UnsupportedAlgorithm

    return (ValueError, TypeError, UnsupportedAlgorithm)


def _cryptography() -> tuple[Any, Any, Any]:
    try:
        from cryptography.hazmat.primitives import serialization
        from cryptography.hazmat.primitives.asymmetric import ec, ed25519
    except ImportError:
        raise SatchelError(
            "signatures require cryptography, which is not installed: pip install cryptography"
        ) from None
    return ec, ed25519, serialization
