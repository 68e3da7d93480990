"""`satchel sign`: signs a bundle, or creates a key pair."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from satchel.runtime.bundle.signature import FORMATS


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `satchel sign`."""
    parser.description = (
        "Sign a bundle: write signature.json (an Ed25519 key) or, with --format oms, model.sig of OpenSSF Model "
        "Signing (a P-256 key) beside its manifest, or into a packed file. With --require-signature NAME.pub, every "
        "command refuses a bundle that is not signed with NAME.pem or was changed since. Needs cryptography."
    )
    parser.epilog = (
        "example:\n  satchel sign --new-key keys/maker\n  satchel sign out/smollm2-int8 --key keys/maker.pem\n"
        "  satchel run out/smollm2-int8 'Once' --require-signature keys/maker.pub"
    )
    parser.add_argument("bundle", metavar="BUNDLE", nargs="?", help="a folder of satchel export, or a packed file")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--key", metavar="PRIVATE.pem", type=Path, help="the private key to sign with")
    what.add_argument("--new-key", metavar="NAME", type=Path, help="create a key pair, NAME.pem and NAME.pub")
    parser.add_argument(
        "--format",
        choices=FORMATS,
        default=FORMATS[0],
        help="what to write: signature.json, which stays valid if the bundle is specialized, or model.sig, which the "
        "tool model_signing reads as well (default: satchel)",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object on one line")


def main(args: argparse.Namespace) -> int:
    """Sign, or create keys, and print what was written."""
    from satchel.runtime.bundle.signature import new_key_pair
    from satchel.runtime.errors import SatchelError

    if (args.bundle is None) != (args.key is None):
        raise SatchelError("give either BUNDLE and --key PRIVATE.pem, or --new-key NAME")
    if args.new_key is not None:
        private, public = new_key_pair(args.new_key, args.format)
        line = f"{private} is the private key: keep it secret; {public} is the public key: give it to those who verify"
        facts = {"private_key": str(private), "public_key": str(public)}
    else:
        digest = _sign(args)
        line, facts = f"{args.bundle}: signed, digest {digest}", {"bundle": args.bundle, "digest": digest}
    if args.json:
        print(json.dumps(facts))
    elif not args.quiet:
        print(line)
    return 0


def _sign(args: argparse.Namespace) -> str:
    """Sign the bundle, and return its digest."""
    import warnings

    from satchel.runtime.bundle.archive.packed import FOLDER
    from satchel.runtime.bundle.archive.zip_writer import PAGE, Entry
    from satchel.runtime.bundle.atomic_write import atomic_write
    from satchel.runtime.bundle.oms import OMS_NAME
    from satchel.runtime.bundle.reader import known_hashes
    from satchel.runtime.bundle.signature import SIGNATURE_NAME, sign, sign_files
    from satchel.runtime.errors import SatchelError, SatchelWarning
    from satchel.runtime.ort.open_bundle import open_bundle
    from satchel.runtime.tools.pack import bundle_entries, write_packed

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SatchelWarning)  # about specialized graphs, which no signature covers
        bundle = open_bundle(args.bundle, progress=not args.quiet, custom=None)
    if args.format == "oms":
        if bundle.manifest.specialized is not None:
            raise SatchelError(
                f"{args.bundle}: is specialized for one machine, and --format oms would sign that too: "
                "sign the bundle as it was exported"
            )
        beside, content = OMS_NAME, sign_files(bundle.folder, known_hashes(bundle), args.key)
    else:
        beside, content = SIGNATURE_NAME, sign(bundle.digest, args.key)
    if bundle.packed is None:
        atomic_write(bundle.folder / beside, content, beside)
    else:
        name = f"{FOLDER}{beside}"
        others = [entry for entry in bundle_entries(bundle) if entry.name != name]
        write_packed(bundle, [others[0], Entry(name, content, PAGE), *others[1:]], bundle.folder, "BUNDLE")
    return bundle.digest
