"""OpenSSF Model Signing: what the reference tool signs and verifies, satchel does too."""

from __future__ import annotations

import base64
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import model_signing
import pytest
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from support.command import Satchel
from support.tiny_bundle import change_manifest

from satchel.runtime.bundle.signature import new_key_pair
from satchel.runtime.cli import main as cli
from satchel.runtime.errors import BundleError
from satchel.runtime.generation.generator import Generator
from satchel.runtime.ort.open_bundle import open_bundle
from satchel.runtime.tools.pack import pack, unpack


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("keys")
    for name in ("maker", "other"):
        new_key_pair(folder / name, "oms")
    new_key_pair(folder / "ed25519")
    return folder


@pytest.fixture
def bundle(tiny: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny, tmp_path / "bundle"))


@pytest.fixture
def signed(satchel: Satchel, bundle: Path, keys: Path) -> Path:
    satchel("sign", bundle, "--key", keys / "maker.pem", "--format", "oms", "--quiet")
    return bundle


def by_reference(bundle: Path, key: Path) -> None:
    """Verify with the reference implementation. Raises ValueError or InvalidSignature."""
    model_signing.verifying.Config().use_elliptic_key_verifier(public_key=key).verify(bundle, bundle / "model.sig")


def sign_by_reference(bundle: Path, key: Path, hashing: model_signing.hashing.Config | None = None) -> None:
    config = hashing or model_signing.hashing.Config().set_ignored_paths(
        paths=[bundle / "model.sig"], ignore_git_paths=True
    )
    signer = model_signing.signing.Config().use_elliptic_key_signer(private_key=key)
    signer.set_hashing_config(config).sign(bundle, bundle / "model.sig")


def test_the_reference_accepts_what_satchel_signs(signed: Path, keys: Path) -> None:
    by_reference(signed, keys / "maker.pub")
    with pytest.raises(ValueError, match="Key mismatch"):
        by_reference(signed, keys / "other.pub")


def test_the_reference_still_accepts_it_with_an_ed25519_signature_beside(
    satchel: Satchel, signed: Path, keys: Path
) -> None:
    satchel("sign", signed, "--key", keys / "ed25519.pem", "--quiet")
    by_reference(signed, keys / "maker.pub")
    for key in ("maker", "ed25519"):
        open_bundle(signed, require_signature=keys / f"{key}.pub")


def test_satchel_accepts_what_the_reference_signs(bundle: Path, keys: Path) -> None:
    (bundle / "NOTES.txt").write_text("what the manifest does not list is signed too")
    sign_by_reference(bundle, keys / "maker.pem")
    assert Generator.open(bundle, threads=1, require_signature=keys / "maker.pub").generate("the cat", 2).token_ids
    with pytest.raises(BundleError, match="another key"):
        open_bundle(bundle, require_signature=keys / "other.pub")
    (bundle / "NOTES.txt").write_text("changed")
    with pytest.raises(BundleError, match=r"NOTES\.txt: changed"):
        open_bundle(bundle, require_signature=keys / "maker.pub")


@pytest.mark.parametrize("curve", [ec.SECP384R1(), ec.SECP521R1()], ids=lambda curve: curve.name)
def test_larger_curves(satchel: Satchel, bundle: Path, tmp_path: Path, curve: ec.EllipticCurve) -> None:
    key = ec.generate_private_key(curve)
    plain = serialization.NoEncryption()
    private, public = tmp_path / "key.pem", tmp_path / "key.pub"
    private.write_bytes(key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, plain))
    public.write_bytes(
        key.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    )
    satchel("sign", bundle, "--key", private, "--format", "oms")
    by_reference(bundle, public)
    open_bundle(bundle, require_signature=public)


@pytest.mark.parametrize(
    ("change", "fact"),
    [
        (lambda folder: change_manifest(folder, "model", "eos_token_ids", to=[7]), r"manifest\.json: changed"),
        (lambda folder: (folder / "more.txt").write_text("x"), r"more\.txt: was added"),
        (lambda folder: (folder / "more.txt").symlink_to("manifest.json"), r"more\.txt: was added"),
        (lambda folder: (folder / "model.sig").unlink(), r"no model\.sig"),
    ],
)
def test_a_bundle_that_changed_is_refused(
    signed: Path, keys: Path, change: Callable[[Path], object], fact: str
) -> None:
    change(signed)
    with pytest.raises(BundleError, match=fact):
        open_bundle(signed, require_signature=keys / "maker.pub")


def resigned(folder: Path, key: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Sign a changed statement, as an honest tool would not."""
    document = json.loads((folder / "model.sig").read_text())
    statement = json.loads(base64.b64decode(document["dsseEnvelope"]["payload"]))
    change(statement)
    payload = json.dumps(statement).encode()
    kind = document["dsseEnvelope"]["payloadType"].encode()
    message = b" ".join((b"DSSEv1", str(len(kind)).encode(), kind, str(len(payload)).encode(), payload))
    private = serialization.load_pem_private_key(key.read_bytes(), None)
    assert isinstance(private, ec.EllipticCurvePrivateKey)
    signature = private.sign(message, ec.ECDSA(hashes.SHA256()))
    document["dsseEnvelope"]["payload"] = base64.b64encode(payload).decode()
    document["dsseEnvelope"]["signatures"][0]["sig"] = base64.b64encode(signature).decode()
    (folder / "model.sig").write_text(json.dumps(document))


def rehash(statement: dict[str, Any]) -> None:
    digest = hashes.Hash(hashes.SHA256())
    for each in statement["predicate"]["resources"]:
        digest.update(bytes.fromhex(each["digest"]))
    statement["subject"][0]["digest"]["sha256"] = digest.finalize().hex()


def without(name: str) -> Callable[[dict[str, Any]], None]:
    def change(statement: dict[str, Any]) -> None:
        resources = statement["predicate"]["resources"]
        resources[:] = [each for each in resources if each["name"] != name]
        rehash(statement)

    return change


def with_file(name: str) -> Callable[[dict[str, Any]], None]:
    def change(statement: dict[str, Any]) -> None:
        statement["predicate"]["resources"].append({"name": name, "algorithm": "sha256", "digest": "00" * 32})
        rehash(statement)

    return change


@pytest.mark.parametrize(
    ("change", "fact"),
    [
        (lambda s: s.update(predicateType="https://model_signing/other/v1"), "predicateType"),
        (lambda s: s.update(_type="other"), "_type"),
        (lambda s: s["predicate"]["serialization"].update(method="shards"), "shards"),
        (lambda s: s["predicate"]["serialization"].update(hash_type="blake3"), "blake3"),
        (lambda s: s["predicate"]["resources"].pop(), "digest of all files"),
        (without("weights.bin"), r"weights\.bin is not signed"),
        (without("manifest.json"), r"manifest\.json: changed"),
        (with_file("gone.bin"), r"gone\.bin"),
        (with_file("../outside"), "outside"),
        (with_file("/etc/hostname"), "hostname"),
    ],
)
def test_a_statement_that_does_not_cover_the_bundle_is_refused(
    signed: Path, keys: Path, change: Callable[[dict[str, Any]], object], fact: str
) -> None:
    resigned(signed, keys / "maker.pem", change)
    with pytest.raises(BundleError, match=fact):
        open_bundle(signed, require_signature=keys / "maker.pub")


@pytest.mark.parametrize(
    ("change", "fact"),
    [
        (lambda d: d.clear(), "verificationMaterial"),
        (lambda d: d.pop("verificationMaterial"), "verificationMaterial"),
        (lambda d: d.pop("dsseEnvelope"), "dsseEnvelope"),
        (
            lambda d: d["verificationMaterial"].update({"certificate": {"rawBytes": ""}, "publicKey": None}),
            "sign again",
        ),
        (lambda d: d.update(verificationMaterial={"x509CertificateChain": {}, "tlogEntries": []}), "x509Certificate"),
        (lambda d: d.update(verificationMaterial={"certificate": {}, "tlogEntries": [{}]}), "certificate"),
        (lambda d: d["dsseEnvelope"].update(payloadType="text/plain"), "text/plain"),
        (lambda d: d["dsseEnvelope"].update(signatures=[]), "sign again"),
        (lambda d: d["dsseEnvelope"].update(payload="e30="), "does not match"),
        (lambda d: d["dsseEnvelope"].update(payload="*"), "sign again"),
        (lambda d: d["verificationMaterial"]["publicKey"].update(hint="00"), "another key"),
    ],
)
def test_a_spoilt_signature_is_refused(
    signed: Path, keys: Path, change: Callable[[dict[str, Any]], object], fact: str
) -> None:
    document = json.loads((signed / "model.sig").read_text())
    change(document)
    (signed / "model.sig").write_text(json.dumps(document))
    with pytest.raises(BundleError, match=fact):
        open_bundle(signed, require_signature=keys / "maker.pub")


@pytest.mark.parametrize(
    "content", [b"", b"[]", b"1", b'"model"', b"\xff", b'{"a": 1, "a": 2}', b" " * ((1 << 20) + 1)]
)
def test_what_is_no_signature_is_refused(signed: Path, keys: Path, content: bytes) -> None:
    (signed / "model.sig").write_bytes(content)
    with pytest.raises(BundleError, match=r"model\.sig"):
        open_bundle(signed, require_signature=keys / "maker.pub")


def test_a_packed_bundle_keeps_its_signature_and_can_get_one(
    satchel: Satchel, signed: Path, tiny: Path, keys: Path, tmp_path: Path
) -> None:
    kept, made = tmp_path / "kept.pyz", tmp_path / "made.pyz"
    pack(open_bundle(signed), kept)
    pack(open_bundle(tiny), made)
    satchel("sign", made, "--key", keys / "maker.pem", "--format", "oms", "--quiet")
    for packed in (kept, made):
        unpack(open_bundle(packed, require_signature=keys / "maker.pub"), folder := packed.with_suffix(""))
        open_bundle(folder, require_signature=keys / "maker.pub")
        by_reference(folder, keys / "maker.pub")


@pytest.mark.parametrize(
    ("flags", "fact"),
    [
        (["--key", "ed25519.pem", "--format", "oms"], "P-256"),
        (["--key", "maker.pem"], "--format oms"),
        (["--key", "maker.pub", "--format", "oms"], "PEM private key"),
    ],
)
def test_a_key_of_another_kind_is_refused(
    bundle: Path, keys: Path, capsys: pytest.CaptureFixture[str], flags: list[str], fact: str
) -> None:
    flags = [str(keys / each) if each.endswith((".pem", ".pub")) else each for each in flags]
    assert cli.main(["sign", str(bundle), *flags]) == 2
    assert fact in capsys.readouterr().err
    assert not (bundle / "model.sig").exists()


def test_a_signed_bundle_is_not_specialized_in_place(
    signed: Path, keys: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (signed / "manifest.json").read_bytes()
    assert cli.main(["specialize", str(signed)]) == 2
    assert "model.sig" in capsys.readouterr().err
    assert (signed / "manifest.json").read_bytes() == before
    by_reference(signed, keys / "maker.pub")
