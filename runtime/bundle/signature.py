"""Ed25519 signatures over a bundle's digest, which covers everything but what a device made for itself."""

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
"""What a signed message begins with, so that no signature made for anything else is one of a bundle."""

KEY_BYTES = 1 << 16
"""The most that is read of a key file."""

PRIVATE_MODE = 0o600


def signed_message(digest: str) -> bytes:
    """The bytes that are signed: `DOMAIN`, and the digest's 32 bytes."""
    return DOMAIN + bytes.fromhex(digest)


def sign(digest: str, key: Path) -> bytes:
    """The content of signature.json for a digest of 64 hex digits, by the private key in a PEM file.

    Raises SatchelError for a key that cannot be read or is of another kind.
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
    """Check that a bundle is signed by the private key of the public key in the PEM file `key`.

    `signature` is where signature.json lies, None where there is none; `digest` is that of the bundle's manifest.
    Raises SatchelError for a key that cannot be read or is of another kind, and BundleError for a bundle that is not
    signed, or by another key, or whose signature is not valid.
    """
    public = _public_key(key)
    if signature is None:
        raise BundleError(f"{bundle}: is not signed, and --require-signature {key} wants it to be: do not trust it")
    found = _read_signature(bundle, signature)
    if found["public_key"] != public.public_bytes_raw().hex():
        raise BundleError(
            f"{bundle}: signed by another key ({found['public_key'][:16]}...) than {key}: "
            "do not trust it, or give the public key of who made it"
        )
    if found["digest"] != digest or not _holds(public, found["signature"], digest):
        raise BundleError(f"{bundle}: its signature is not valid for what is in it: do not trust it")


def new_key_pair(name: Path) -> tuple[Path, Path]:
    """Make a key pair, NAME.pem (private, for its owner alone to read) and NAME.pub.

    Raises SatchelError where one of the files is there already or cannot be written.
    """
    ed25519, serialization = _cryptography()
    private_file, public_file = (name.with_name(f"{name.name}.{suffix}") for suffix in ("pem", "pub"))
    for path in (private_file, public_file):
        if os.path.lexists(path):
            raise SatchelError(f"--new-key {name}: {path} is there already: name another key, or remove it")
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
            f"--new-key {name}: {private_file} cannot be written ({error.strerror}): name another"
        ) from None
    atomic_write(public_file, public, "--new-key")
    return private_file, public_file


def _read_signature(bundle: Path, span: Span) -> dict[str, str]:
    name = f"{bundle}/signature.json"
    if span.length > LIMITS["signature.json bytes"].most:
        raise BundleError(f"{name}: longer than any signature: do not trust this bundle")
    try:
        document = strict_json.loads(span.read())
    except OSError as error:
        raise BundleError(f"{name}: cannot be read ({error.strerror}): give yourself the right to") from None
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
        raise BundleError(f"{name}: no signature of a kind that this satchel knows: sign the bundle again")
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
            f"--key {path}: no private key in PEM without a password: make one with satchel sign --new-key"
        ) from None
    if not isinstance(key, ed25519.Ed25519PrivateKey):
        raise SatchelError(f"--key {path}: a private key, but not of Ed25519: make one with satchel sign --new-key")
    return cast("Ed25519PrivateKey", key)


def _public_key(path: Path) -> Ed25519PublicKey:
    ed25519, serialization = _cryptography()
    content = _key_file(path, "--require-signature")
    try:
        key = serialization.load_pem_public_key(content)
    except _key_errors():
        raise SatchelError(
            f"--require-signature {path}: no public key in PEM: give the .pub file of satchel sign --new-key"
        ) from None
    if not isinstance(key, ed25519.Ed25519PublicKey):
        raise SatchelError(f"--require-signature {path}: a public key, but not of Ed25519: give one that is")
    return cast("Ed25519PublicKey", key)


def _key_file(path: Path, option: str) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(KEY_BYTES)
    except OSError as error:
        raise SatchelError(f"{option} {path}: cannot be read ({error.strerror}): give the file of a key") from None


def _key_errors() -> tuple[type[Exception], ...]:
    """What reading a key raises where the file holds none, one with a password, or one of an unknown kind."""
    from cryptography.exceptions import UnsupportedAlgorithm

    return (ValueError, TypeError, UnsupportedAlgorithm)


def _cryptography() -> tuple[Any, Any]:
    try:
        from cryptography.hazmat.primitives import serialization
        from cryptography.hazmat.primitives.asymmetric import ed25519
    except ImportError:
        raise SatchelError(
            "signatures need the package cryptography, which is not installed: pip install cryptography"
        ) from None
    return ed25519, serialization
