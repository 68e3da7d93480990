"""Ed25519 signatures over a bundle's digest, which covers everything except specialized graphs."""

from __future__ import annotations

import binascii
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from satchel.runtime.bundle import strict_json
from satchel.runtime.bundle.archive.span import Span
from satchel.runtime.bundle.atomic_write import atomic_write
from satchel.runtime.bundle.errors import BundleError, SatchelError
from satchel.runtime.bundle.limits import LIMITS

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

FORMAT, VERSION, ALGORITHM = "satchel-signature", 1, "ed25519"

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
    private = _private_key(key)
    document = {
        "format": FORMAT,
        "version": VERSION,
        "algorithm": ALGORITHM,
        "digest": digest,
        "public_key": private.public_key().public_bytes_raw().hex(),
        "signature": private.sign(signed_message(digest)).hex(),
    }
    return (json.dumps(document, indent=1) + "\n").encode("ascii")


def check_signature(bundle: Path, signature: Span | None, digest: str, key: Path) -> None:
    """Check that a bundle is signed with the private key that belongs to the public key in the PEM file `key`.

    `signature` is the span of signature.json, or None if there is none; `digest` is the manifest's. Raises SatchelError
    if the key cannot be read or is not an Ed25519 key, and BundleError if the bundle is not signed, is signed with
    another key, or has an invalid signature.
    """
    public = _public_key(key)
    if signature is None:
        raise BundleError(f"{bundle}: not signed, but --require-signature {key} requires it: do not trust it")
    found = _read_signature(bundle, signature)
    if found["public_key"] != public.public_bytes_raw().hex():
        raise BundleError(
            f"{bundle}: signed with another key ({found['public_key'][:16]}...) than {key}: "
            "do not trust it, or give the public key of its maker"
        )
    if found["digest"] != digest or not _holds(public, found["signature"], digest):
        raise BundleError(f"{bundle}: its signature does not match its content: do not trust it")


def new_key_pair(name: Path) -> tuple[Path, Path]:
    """Create a key pair, NAME.pem (private, readable by its owner only) and NAME.pub.

    Raises SatchelError if one of the files exists or cannot be written.
    """
    ed25519, serialization = _cryptography()
    private_file, public_file = (name.with_name(f"{name.name}.{suffix}") for suffix in ("pem", "pub"))
    for path in (private_file, public_file):
        if os.path.lexists(path):
            raise SatchelError(f"--new-key {name}: {path} already exists: choose another name, or remove it")
    private = ed25519.Ed25519PrivateKey.generate()
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


def _read_signature(bundle: Path, span: Span) -> dict[str, str]:
    name = f"{bundle}/signature.json"
    if span.length > LIMITS["signature.json bytes"].most:
        raise BundleError(f"{name}: exceeds the limit for signatures: do not trust this bundle")
    try:
        document = strict_json.loads(span.read())
    except OSError as error:
        raise BundleError(f"{name}: cannot be read ({error.strerror}): check its permissions") from None
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


def _private_key(path: Path) -> Ed25519PrivateKey:
    ed25519, serialization = _cryptography()
    content = _key_file(path, "--key")
    try:
        key = serialization.load_pem_private_key(content, password=None)
    except _key_errors():
        raise SatchelError(
            f"--key {path}: not a PEM private key without a password: create one with satchel sign --new-key"
        ) from None
    if not isinstance(key, ed25519.Ed25519PrivateKey):
        raise SatchelError(f"--key {path}: not an Ed25519 key: create one with satchel sign --new-key")
    return cast("Ed25519PrivateKey", key)


def _public_key(path: Path) -> Ed25519PublicKey:
    ed25519, serialization = _cryptography()
    content = _key_file(path, "--require-signature")
    try:
        key = serialization.load_pem_public_key(content)
    except _key_errors():
        raise SatchelError(
            f"--require-signature {path}: not a PEM public key: give the .pub file of satchel sign --new-key"
        ) from None
    if not isinstance(key, ed25519.Ed25519PublicKey):
        raise SatchelError(
            f"--require-signature {path}: not an Ed25519 key: give the .pub file of satchel sign --new-key"
        )
    return cast("Ed25519PublicKey", key)


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


def _cryptography() -> tuple[Any, Any]:
    try:
        from cryptography.hazmat.primitives import serialization
        from cryptography.hazmat.primitives.asymmetric import ed25519
    except ImportError:
        raise SatchelError(
            "signatures require cryptography, which is not installed: pip install cryptography"
        ) from None
    return ed25519, serialization
