"""Signatures: who made a bundle, and that it is what was signed."""

from __future__ import annotations

import json
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from support.command import Satchel
from support.full_disk import largest_file
from support.tiny_bundle import change_manifest, read_manifest

from satchel.runtime.bundle import reader as bundle_module
from satchel.runtime.bundle.signature import new_key_pair
from satchel.runtime.cli import main as cli
from satchel.runtime.errors import BundleError, SatchelError, SatchelWarning
from satchel.runtime.generation.generator import Generator
from satchel.runtime.ort.open_bundle import open_bundle
from satchel.runtime.tools.pack import pack, unpack


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("keys")
    for name in ("maker", "other"):
        new_key_pair(folder / name)
    return folder


@pytest.fixture
def signed(satchel: Satchel, tiny: Path, keys: Path, tmp_path: Path) -> Path:
    folder = Path(shutil.copytree(tiny, tmp_path / "bundle"))
    satchel("sign", folder, "--key", keys / "maker.pem", "--quiet")
    return folder


def test_a_signed_bundle_opens_with_the_right_key_and_no_other(signed: Path, keys: Path) -> None:
    generator = Generator.open(signed, threads=1, require_signature=keys / "maker.pub")
    assert generator.generate("the cat", 2).token_ids
    with pytest.raises(BundleError, match=r"another key \([0-9a-f]{16}\.\.\.\) than .*other\.pub"):
        open_bundle(signed, require_signature=keys / "other.pub")


def test_the_signature_is_one_of_the_digest_by_any_other_library(signed: Path, keys: Path) -> None:
    document = json.loads((signed / "signature.json").read_text())
    public = ed25519.Ed25519PublicKey.from_public_bytes(bytes.fromhex(document["public_key"]))
    digest = read_manifest(signed)["digest"]
    public.verify(bytes.fromhex(document["signature"]), b"satchel bundle digest, version 1\0" + bytes.fromhex(digest))
    assert (document["digest"], document["algorithm"]) == (digest, "ed25519")


@pytest.mark.parametrize("digest", ["old", "new"])
def test_a_manifest_changed_with_a_right_digest_is_refused(signed: Path, keys: Path, digest: str) -> None:
    change_manifest(signed, "model", "eos_token_ids", to=[7])
    if digest == "new":
        signature = json.loads((signed / "signature.json").read_text())
        signature["digest"] = read_manifest(signed)["digest"]
        (signed / "signature.json").write_text(json.dumps(signature))
    open_bundle(signed)
    with pytest.raises(BundleError, match="its signature does not match"):
        open_bundle(signed, require_signature=keys / "maker.pub")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"signature": "00" * 64}, "its signature does not match"),
        ({"signature": "no hex"}, "its signature does not match"),
        ({"signature": 1}, "not a signature"),
        ({"version": 2}, "not a signature"),
        ({"version": True}, "not a signature"),
        ({"algorithm": "none"}, "not a signature"),
        ({"more": 1}, "not a signature"),
        ({"public_key": "x" * 5000}, "exceeds the limit for signatures"),
        *((content, r"signature\.json: not") for content in (b"", b"[]", b'{"a": 1, "a": 1}', b"\xff")),
    ],
)
def test_a_spoilt_signature_file_is_refused(signed: Path, keys: Path, change: dict | bytes, message: str) -> None:
    document = json.loads((signed / "signature.json").read_text())
    content = change if isinstance(change, bytes) else json.dumps({**document, **change}).encode()
    (signed / "signature.json").write_bytes(content)
    with pytest.raises(BundleError, match=message):
        open_bundle(signed, require_signature=keys / "maker.pub")


def test_all_files_are_hashed_whatever_is_remembered(signed: Path, keys: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    open_bundle(signed)
    hashed = []
    original = bundle_module.sha256_of

    def hashing(path: Path, *rest: object) -> str:
        hashed.append(path.name)
        return original(path, *rest)

    monkeypatch.setattr(bundle_module, "sha256_of", hashing)
    open_bundle(signed)
    assert hashed == []
    open_bundle(signed, require_signature=keys / "maker.pub")
    assert sorted(hashed) == sorted(read_manifest(signed)["files"])


def test_specialized_graphs_stay_unused_and_the_signature_valid(signed: Path, keys: Path) -> None:
    from satchel.runtime.optimize.specialize import specialize

    specialize(open_bundle(signed), threads=1)
    assert open_bundle(signed).specialized is not None
    with pytest.warns(SatchelWarning, match="the portable graphs run, since the signature does not cover"):
        bundle = open_bundle(signed, require_signature=keys / "maker.pub")
    assert bundle.specialized is None


def test_a_packed_bundle_keeps_its_signature_and_can_get_one(
    satchel: Satchel, signed: Path, tiny: Path, keys: Path, tmp_path: Path
) -> None:
    public = keys / "maker.pub"
    pack(open_bundle(signed), tmp_path / "signed.pyz")
    open_bundle(tmp_path / "signed.pyz", require_signature=public)
    pack(open_bundle(tiny), tmp_path / "plain.pyz")
    with pytest.raises(BundleError, match="not signed"):
        open_bundle(tmp_path / "plain.pyz", require_signature=public)
    for _ in range(2):
        satchel("sign", tmp_path / "plain.pyz", "--key", keys / "maker.pem", "--quiet")
    assert (tmp_path / "plain.pyz").read_bytes() == (tmp_path / "signed.pyz").read_bytes()
    unpack(open_bundle(tmp_path / "plain.pyz"), tmp_path / "again")
    assert (tmp_path / "again" / "signature.json").read_bytes() == (signed / "signature.json").read_bytes()


def test_new_keys_are_for_their_owner_and_never_replaced(satchel: Satchel, tmp_path: Path) -> None:
    command = ("sign", "--new-key", tmp_path / "v1.maker")
    satchel(*command)
    private, public = tmp_path / "v1.maker.pem", tmp_path / "v1.maker.pub"
    assert stat.S_IMODE(private.stat().st_mode) == 0o600
    before = private.read_bytes(), public.read_bytes()
    assert before[0].startswith(b"-----BEGIN PRIVATE KEY-----")
    assert before[1].startswith(b"-----BEGIN PUBLIC KEY-----")
    assert "v1.maker.pem already exists" in satchel.refuses(*command)
    private.unlink()
    satchel.refuses(*command)
    assert not private.exists()
    assert public.read_bytes() == before[1]


def test_a_key_file_of_another_kind_is_refused(satchel: Satchel, signed: Path, keys: Path, tmp_path: Path) -> None:
    encoding, private = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    curve, plain = ec.generate_private_key(ec.SECP256K1()), serialization.NoEncryption()  # no curve of model.sig
    locked = serialization.BestAvailableEncryption(b"x")
    for name, content in {
        "ec.pem": curve.private_bytes(encoding, private, plain),
        "ec.pub": curve.public_key().public_bytes(encoding, serialization.PublicFormat.SubjectPublicKeyInfo),
        "locked.pem": ed25519.Ed25519PrivateKey.generate().private_bytes(encoding, private, locked),
        "none": b"hello",
    }.items():
        (tmp_path / name).write_bytes(content)
    for key, message in (
        (tmp_path / "ec.pub", "neither an Ed25519 key"),
        (tmp_path / "none", "not a PEM public key"),
        (keys / "maker.pem", "not a PEM public key"),
        (tmp_path / "nowhere", "cannot be read"),
        (tmp_path, "cannot be read"),
    ):
        with pytest.raises(SatchelError, match=rf"^--require-signature .*: {message}"):
            open_bundle(signed, require_signature=key)
    for key, message in (
        (tmp_path / "ec.pem", "not an Ed25519 key"),
        (keys / "maker.pub", "not a PEM private key"),
        (tmp_path / "locked.pem", "not a PEM private key"),
        (tmp_path / "nowhere", "cannot be read"),
    ):
        assert message in satchel.refuses("sign", signed, "--key", key)


def test_every_command_that_opens_a_bundle_checks(satchel: Satchel, tiny: Path, keys: Path, tmp_path: Path) -> None:
    (tmp_path / "text").write_text("the cat sat on the mat")
    further = {
        "run": ["the cat"], "eval": ["--text", str(tmp_path / "text")], "pack": ["-o", str(tmp_path / "m.pyz")],
        "embed": ["the cat"], "unpack": ["-o", str(tmp_path / "m")], "check": ["--provider", "cuda"],
            "shard": ["--tensor-parallel", "2", "-o", str(tmp_path / "ranks")],
    }  # fmt: skip
    checked = [name for name, command in cli.COMMANDS.items() if command.opens and name != "specialize"]
    assert {"run", "chat", "bench", "eval", "verify", "profile", "inspect", "pack"} <= set(checked)
    for name in checked:
        said = satchel.refuses(name, tiny, *further.get(name, []), "--require-signature", keys / "maker.pub")
        assert "tiny: not signed" in said, name


@pytest.mark.parametrize(
    "arguments",
    [
        ["sign", "BUNDLE"],
        ["sign", "--key", "x"],
        ["sign", "BUNDLE", "--new-key", "x"],
        ["run", "BUNDLE", "the cat", "--specialize", "--require-signature", "x"],
    ],
)
def test_a_command_line_that_makes_no_sense_is_refused(satchel: Satchel, arguments: list[str]) -> None:
    satchel.refuses(*arguments)


def test_a_disk_that_is_full_leaves_the_bundle_as_it_was(satchel: Satchel, signed: Path, keys: Path) -> None:
    before = (signed / "signature.json").read_bytes()
    with largest_file(10):
        said = satchel.refuses("sign", signed, "--key", keys / "other.pem")
    assert "cannot be written (File too large)" in said
    assert (signed / "signature.json").read_bytes() == before


def test_without_cryptography_it_says_what_to_install(signed: Path, keys: Path) -> None:
    code = "import sys; sys.modules['cryptography'] = None; from satchel.runtime.cli.main import main; sys.exit(main())"
    for arguments in (
        ["run", str(signed), "the cat", "--require-signature", str(keys / "maker.pub")],
        ["sign", str(signed), "--key", str(keys / "maker.pem")],
    ):
        done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)
        assert done.returncode == 2
        assert done.stderr.endswith("cryptography, which is not installed: pip install cryptography\n")
