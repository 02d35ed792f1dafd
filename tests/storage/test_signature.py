"""Signatures of pictures, as C2PA's own reader and `facelora inspect` read them."""

# pyright: reportMissingImports=false

import datetime
import io
import json
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from PIL import Image

from core.cli import main
from core.errors import BadConfig
from core.storage import signature
from core.storage.drawn import DRAWN, inspect_mark, save_png, write_picture
from core.storage.signature import SELF_MADE, can_sign, inspect_signature
from core.version import __version__
from tests.marks import is_signed
from tools.house import ROOT

c2pa = pytest.importorskip("c2pa", reason="needs the extra marks")
PARAMETERS = (
    "sks person <lora:anna:1>\nNegative prompt: Model hash: ffffffff\nSteps: 20, Model hash: 0123456789, Model: base, "
    'Lora hashes: "anna: abcdef123456, ben: 112233445566"'
)
PICTURE = Image.effect_noise((256, 256), 50).convert("RGB")


@pytest.fixture
def drawn(tmp_path) -> Path:
    save_png(tmp_path / "a.png", PICTURE, {"parameters": PARAMETERS})
    return tmp_path / "a.png"


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP"])
def test_a_signed_picture_has_all_its_marks(format, tmp_path):
    path = tmp_path / f"a.{format.lower()}"
    with path.open("wb") as file:
        write_picture(file, PICTURE, format, {"parameters": PARAMETERS})
    assert is_signed(path)
    assert inspect_mark(path) == {"digital_source_type": DRAWN, "creator_tool": f"FaceLoRA {__version__}"}
    with Image.open(path) as image:
        image.load()
        assert format != "PNG" or image.info["parameters"] == PARAMETERS


def test_the_signature_names_the_software_and_the_models_by_hash(drawn):
    (claim,) = inspect_signature(drawn)["history"]
    assert claim == {
        "program": f"FaceLoRA {__version__}",
        "certificate": SELF_MADE,
        "actions": ["c2pa.created"],
        "digital_source_type": DRAWN,
        "made_with": ["base model 0123456789", "LoRA abcdef123456", "LoRA 112233445566"],
    }
    manifest = json.loads(c2pa.Reader("image/png", io.BytesIO(drawn.read_bytes())).json())
    assert "anna" not in json.dumps(manifest) and "thumbnail" not in json.dumps(manifest)
    (actions,) = (one for one in next(iter(manifest["manifests"].values()))["assertions"] if "actions" in one["label"])
    assert actions["data"]["actions"][0]["softwareAgent"] == {"name": "FaceLoRA", "version": __version__}


def test_a_copy_names_no_program_that_drew_it(tmp_path):
    for is_copy in (False, True):
        save_png(tmp_path / "a.png", PICTURE, is_copy=is_copy)
        assert is_signed(tmp_path / "a.png") and (b"softwareAgent" in (tmp_path / "a.png").read_bytes()) != is_copy


def test_changed_pixels_are_found(drawn):
    data = bytearray(drawn.read_bytes())
    data[len(data) // 2] ^= 1
    drawn.write_bytes(data)
    assert inspect_signature(drawn)["state"] == "changed" and not is_signed(drawn)


def test_a_picture_saved_again_is_not_signed(drawn, capsys):
    with Image.open(drawn) as image:
        image.save(drawn.with_suffix(".jpg"))
    assert inspect_signature(drawn.with_suffix(".jpg"))["state"] == "none"
    assert main(["inspect", str(drawn.with_suffix(".jpg"))]) == 0
    assert capsys.readouterr().out.endswith("; not signed, or the signature was removed\n")


def test_an_editor_that_signs_is_shown_after_us(drawn, capsys):
    edited = {"action": "c2pa.color_adjustments"}
    manifest = {
        "claim_generator_info": [{"name": "Editor", "version": "9"}],
        "assertions": [{"label": "c2pa.actions", "data": {"actions": [edited]}}],
    }
    out = io.BytesIO()
    signer = c2pa.Signer.from_info(c2pa.C2paSignerInfo(*signature._credentials(), None))
    builder = c2pa.Builder(manifest)
    builder.set_intent(c2pa.C2paBuilderIntent.EDIT)
    builder.sign(signer, "image/png", io.BytesIO(drawn.read_bytes()), out)
    drawn.write_bytes(out.getvalue())
    assert [one["program"] for one in inspect_signature(drawn)["history"]] == [f"FaceLoRA {__version__}", "Editor 9"]
    assert main(["inspect", str(drawn)]) == 0
    assert "; then Editor 9 (c2pa.opened, c2pa.color_adjustments)" in capsys.readouterr().out


def test_damaged_signatures_are_answered(drawn, capsys):
    whole = drawn.read_bytes()
    start = whole.index(b"caBX")
    for position in range(start - 4, start + 3600, 90):
        drawn.write_bytes(whole[:position] + bytes([whole[position] ^ 255]) + whole[position + 1 :])
        assert main(["inspect", str(drawn)]) in (0, 1)
    assert "unchanged" not in capsys.readouterr().out


def test_reading_a_signature_asks_no_server(tmp_path):
    asked = []

    class Server(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_error(404)

    server = HTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    builder = c2pa.Builder({"claim_generator_info": [{"name": "Editor"}], "assertions": []})
    builder.set_intent(c2pa.C2paBuilderIntent.CREATE, c2pa.C2paDigitalSourceType.DIGITAL_CREATION)
    builder.set_no_embed()
    builder.set_remote_url(f"http://127.0.0.1:{server.server_port}/manifest.c2pa")
    source, out = io.BytesIO(), io.BytesIO()
    PICTURE.save(source, "PNG")
    builder.sign(c2pa.Signer.from_info(c2pa.C2paSignerInfo(*signature._credentials(), None)), "image/png", source, out)
    (tmp_path / "a.png").write_bytes(out.getvalue())
    assert inspect_signature(tmp_path / "a.png")["state"] == "unreadable" and not asked
    server.shutdown()


def test_no_two_pictures_have_the_same_key_and_none_is_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("FACELORA_CACHE", str(tmp_path / "cache"))
    assert signature._credentials()[1:] != signature._credentials()[1:]
    save_png(tmp_path / "a.png", PICTURE)
    assert is_signed(tmp_path / "a.png") and [file.name for file in tmp_path.iterdir()] == ["a.png"]


@pytest.mark.parametrize("kind", ["ec", "ed25519", "rsa"])
def test_a_users_own_certificate_signs(kind, tmp_path, monkeypatch):
    monkeypatch.setenv(signature.CERTIFICATE, str(own_certificate(tmp_path / "own.pem", kind)))
    save_png(tmp_path / "a.png", PICTURE)
    assert is_signed(tmp_path / "a.png")
    assert inspect_signature(tmp_path / "a.png")["history"][0]["certificate"] == "Anna"


def test_a_certificate_that_cant_be_used_is_refused_by_name(tmp_path, monkeypatch):
    expired = own_certificate(tmp_path / "old.pem", "ec", datetime.datetime(2020, 1, 1))
    (tmp_path / "empty.pem").write_text("")
    for path in (tmp_path / "missing.pem", tmp_path / "empty.pem", expired):
        monkeypatch.setenv(signature.CERTIFICATE, str(path))
        with pytest.raises(BadConfig, match=path.name):
            save_png(tmp_path / "a.png", PICTURE)
    assert not (tmp_path / "a.png").exists()


def test_without_the_package_pictures_are_only_marked_and_commands_say_so(drawn, monkeypatch, capsys):
    monkeypatch.setattr(signature, "_c2pa", lambda: None)
    save_png(drawn, PICTURE)
    assert not is_signed(drawn) and inspect_mark(drawn)["digital_source_type"] == DRAWN and not can_sign()
    assert main(["inspect", str(drawn)]) == 0
    assert signature.HOW_TO_SIGN in capsys.readouterr().out


def test_the_package_is_loaded_when_a_picture_is_signed_and_not_before():
    code = "import sys, core.storage.drawn, core.cli; print('c2pa' in sys.modules or 'cryptography' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", code], cwd=ROOT, text=True).strip() == "False"


def own_certificate(path: Path, kind: str, end: datetime.datetime = datetime.datetime(2100, 1, 1)) -> Path:
    """A PEM file with a key and a certificate of Anna, from an issuer that nobody trusts."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

    makers = {"ec": lambda: ec.generate_private_key(ec.SECP384R1()), "ed25519": ed25519.Ed25519PrivateKey.generate}
    key = makers.get(kind, lambda: rsa.generate_private_key(65537, 2048))()
    issuer = ec.generate_private_key(ec.SECP256R1())
    name, other = map(x509.Name.from_rfc4514_string, ("CN=Anna,O=Studio", "CN=Issuer,O=Issuer"))
    certificate = (
        x509.CertificateBuilder(other, name, key.public_key(), 7, datetime.datetime(2019, 1, 1), end)
        .add_extension(x509.BasicConstraints(False, None), True)
        .add_extension(x509.KeyUsage(True, *[False] * 8), True)
        .add_extension(x509.ExtendedKeyUsage([x509.OID_EMAIL_PROTECTION]), False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer.public_key()), False)
        .sign(issuer, hashes.SHA256())
    )
    pem = serialization.Encoding.PEM
    private = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    path.write_bytes(certificate.public_bytes(pem) + private)
    return path
