"""Sign pictures with Content Credentials (C2PA), and read such signatures. The package c2pa-python does both.

A signature covers all bytes of a file, so it is the last thing to be written.
"""

# pyright: reportMissingImports=false

import datetime
import io
import os
import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from PIL import Image

from ..errors import BadConfig
from ..version import __version__
from .plain_values import parse_json

CERTIFICATE = "FACELORA_CERTIFICATE"
"""The environment variable with the user's own certificate: a PEM file with its private key, itself, and its issuers."""
SELF_MADE = "self-made: proves no identity"
"""The name in the certificate that is made for users without one."""
HOW_TO_SIGN = "pip install c2pa-python"
PROGRAM = {"name": "FaceLoRA", "version": __version__}
_HASHES = {"Model": "base model", "VAE": "VAE", "Lora": "LoRA", "Speed LoRA": "LoRA", "TI": "embedding"}
"""What A1111's hashes belong to."""


@cache
def _c2pa() -> Any:
    """Return the module c2pa; None without it, if its library doesn't load here, or before version 0.32."""
    try:
        import c2pa
    except (ImportError, OSError, RuntimeError):
        return None
    return c2pa if hasattr(c2pa, "Context") else None


def can_sign() -> bool:
    """Return whether pictures are signed."""
    return _c2pa() is not None


def hashes_in(parameters: str) -> dict[str, str]:
    """Return what A1111's parameters say a picture was drawn with, such as "LoRA", by its hash."""
    settings, found = parameters.rpartition("\n")[2], dict[str, str]()
    for name, what in _HASHES.items():
        if text := re.search(rf'(?:^|, ){name} hash(?:es)?: ("[^"]*"|\w+)', settings):
            found |= dict.fromkeys(re.findall(r"\b([0-9a-f]{8,64})\b(?=[,\"]|$)", text[1]), what)
    return found


def signed(picture: bytes, format: str, source_type: str, hashes: Mapping[str, str], is_copy: bool) -> bytes:
    """Return the file of a picture with a signature; unchanged without c2pa-python.

    `source_type` is the address of its digital source type, and `hashes` is as from `hashes_in`. Raises BadConfig for a
    certificate that can't be used.
    """
    if (c2pa := _c2pa()) is None:
        return picture
    created = {"action": "c2pa.created", "digitalSourceType": source_type}
    created |= ({} if is_copy else {"softwareAgent": PROGRAM}) | {"parameters": {"ingredientIds": [*hashes]}}
    model = {"relationship": "inputTo", "data_types": [{"type": "c2pa.types.model"}]}
    manifest = {
        "claim_generator_info": [PROGRAM],
        "ingredients": [model | {"title": what, "instance_id": number} for number, what in hashes.items()],
        "assertions": [{"label": "c2pa.actions", "data": {"actions": [created]}}],
    }
    credentials, file = _credentials(), io.BytesIO()
    try:
        info = c2pa.C2paSignerInfo(*credentials, "")
        info.ta_url = None  # no time stamp, which would need the network; before 0.38 only a text can be given above
        with c2pa.Signer.from_info(info) as signer, c2pa.Builder(manifest, _context()) as builder:
            builder.sign(signer, f"image/{format.lower()}", io.BytesIO(picture), file)
    except c2pa.C2paError as error:
        raise BadConfig(f"{os.environ.get(CERTIFICATE, 'certificate')}: pictures can't be signed: {error}") from None
    return file.getvalue()


@cache
def _context() -> Any:
    """Return settings with which c2pa-python neither uses the network nor adds thumbnails."""
    checks = {"remote_manifest_fetch": False, "ocsp_fetch": False, "verify_after_sign": False}
    return _c2pa().Context.from_dict({"verify": checks, "builder": {"thumbnail": {"enabled": False}}})


def _credentials() -> tuple[str, bytes, bytes]:
    """Return the algorithm, the certificates and the private key of CERTIFICATE, or else new ones.

    New ones for each picture: with the same ones, anybody could see which pictures come from one machine.
    """
    if own := os.environ.get(CERTIFICATE):
        try:
            return _parsed(Path(own).read_bytes())
        except (OSError, ValueError, TypeError) as error:  # TypeError: the key has a password.
            raise BadConfig(f"{CERTIFICATE}={own}: must be a PEM file of a key without password: {error}") from None
    return _parsed(_self_made())


def _parsed(pem: bytes) -> tuple[str, bytes, bytes]:
    """Return the algorithm, certificates and key of a PEM file. Raises ValueError unless the key is the certificate's."""
    from cryptography import x509
    from cryptography.hazmat.primitives import serialization as forms

    issued, key = x509.load_pem_x509_certificates(pem), forms.load_pem_private_key(pem, None)
    if key.public_key() != issued[0].public_key():
        raise ValueError("its first certificate is not that of the key")
    size = getattr(key, "key_size", 0)
    algorithm = {256: "es256", 384: "es384", 521: "es512"}.get(size, "ps256" if size else "ed25519")
    private = key.private_bytes(forms.Encoding.PEM, forms.PrivateFormat.PKCS8, forms.NoEncryption())
    return algorithm, b"".join(one.public_bytes(forms.Encoding.PEM) for one in issued), private


def _self_made() -> bytes:
    """Return a PEM file with a new key and its certificate, which says that it proves nothing about who has the key."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives import serialization as forms
    from cryptography.hazmat.primitives.asymmetric import ec

    # C2PA refuses certificates that sign themselves, so another key does, which is thrown away.
    key, issuer = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    nobody, name = (x509.Name.from_rfc4514_string(f"CN={one},O=FaceLoRA") for one in ("nobody", SELF_MADE))
    since, until = datetime.datetime(2026, 1, 1), datetime.datetime(9999, 12, 31)
    certificate = (
        x509.CertificateBuilder(nobody, name, key.public_key(), x509.random_serial_number(), since, until)
        .add_extension(x509.BasicConstraints(False, None), True)
        .add_extension(x509.KeyUsage(True, *[False] * 8), True)  # digital signatures and nothing else
        .add_extension(x509.ExtendedKeyUsage([x509.OID_EMAIL_PROTECTION]), False)  # one of those that C2PA asks for
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer.public_key()), False)
        .sign(issuer, hashes.SHA256())
    )
    private = key.private_bytes(forms.Encoding.PEM, forms.PrivateFormat.PKCS8, forms.NoEncryption())
    return private + certificate.public_bytes(forms.Encoding.PEM)


def inspect_signature(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Return the `state` of the signature in a picture's file, its `problems` by C2PA's names, and its `history`.

    The state is "none", "valid", "changed" (after signing), "invalid" (for another reason, such as an expired certificate),
    "unreadable", or "unknown" without c2pa-python. The history has, oldest first, who signed the picture and what they stated.
    """
    found: dict[str, Any] = {"state": "unknown", "problems": [], "history": []}
    if (c2pa := _c2pa()) is None:
        return found
    try:
        with Image.open(path) as image:
            kind = image.get_format_mimetype() or ""
        with open(path, "rb") as file, c2pa.Reader(kind, file, context=_context()) as reader:
            report = parse_json(reader.json())
        results = report["validation_results"]
        checked = [results["activeManifest"], *(one["validationDeltas"] for one in results.get("ingredientDeltas", ()))]
        codes = {failure["code"] for one in checked for failure in one.get("failure", ())}
        problems = sorted(codes - {"signingCredential.untrusted"})
        history, label = list[dict[str, Any]](), report["active_manifest"]
        while claim := report["manifests"].pop(label, None):  # Popped, so that a circle ends.
            history.insert(0, _summary(claim))
            parents = [one for one in claim.get("ingredients", ()) if one.get("relationship") == "parentOf"]
            label = parents[0].get("active_manifest") if parents else None
    except c2pa.C2paError.ManifestNotFound:
        return found | {"state": "none"}
    except (c2pa.C2paError, ValueError, TypeError, AttributeError, LookupError) as error:
        return found | {"state": "unreadable", "problems": [str(error)[:200]]}
    state = "valid" if not problems else "changed" if any("mismatch" in code for code in problems) else "invalid"
    return {"state": state, "problems": problems, "history": history}


def _summary(claim: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a claim states: the program, the name in the certificate, what was done, and the models by hash."""
    (program, *_), signature = claim.get("claim_generator_info") or [{}], claim["signature_info"]
    lists = (one["data"]["actions"] for one in claim["assertions"] if one["label"].startswith("c2pa.actions"))
    actions = [action for one in lists for action in one]
    types = (one["digitalSourceType"].rpartition("/")[2] for one in actions if "digitalSourceType" in one)
    models = [one for one in claim.get("ingredients", ()) if one.get("relationship") == "inputTo"]
    return {
        "program": " ".join(filter(None, (program.get("name", "a program"), program.get("version")))),
        "certificate": signature.get("common_name") or signature.get("issuer"),
        "actions": [action["action"] for action in actions],
        "digital_source_type": next(types, None),
        "made_with": [f"{one.get('title')} {one.get('instance_id')}" for one in models],
    }
