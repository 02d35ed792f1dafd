"""`make lint` names the faults of the texts: python -m tools.wording."""

from pathlib import Path

import pytest

from tools import wording

pytestmark = pytest.mark.ci

LONG = "A" + " word" * 30


@pytest.mark.parametrize(
    ("name", "text", "found"),
    [
        ("docs/a.md", f"# Title\n\nGood.\n\nFine. {LONG}.\n\n| {LONG} |\n\n```\n{LONG}\n```\n", "5: 31 words"),
        ("core/a.py", f'"""Good.\n\n    {LONG}\n\nIt is no file."""\n', "5: 'is no'"),
        ("core/a.py", 'raise BadFile(f"{1}: use --steps")\n', "1: an error outside the command line names an option"),
        ("nodes/comfyui/a.py", 'Input("a",\n  tooltip="The training ends.")\n', "2: 'The training'"),
        ("web/docs/A.md", f"## Inputs\n| `a` | INT | `1` | {'Words. ' * 50} |\n", "2: 350 characters"),
        ("web/a.js", 'say(\n  "{} stands here")\n', "2: 'stands'"),
        ("web/docs/A/zh.md", "# A\n检查点", "2: 检查点: write 中间 LoRA"),
    ],
)
def test_a_fault_is_named_with_its_file_and_line(name, text, found, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(wording, "ROOT", tmp_path)
    path: Path = tmp_path / name
    path.parent.mkdir(parents=True)
    path.write_text(text, encoding="utf-8")
    assert wording.main([path]) == 1
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith(f"{name}:{found}")


def test_what_has_no_fault_passes(tmp_path, capsys):
    (tmp_path / "a.md").write_text("The training goes on.\n")  # which only a text on screen may not say
    assert wording.main([tmp_path / "a.md"]) == 0 and capsys.readouterr().out == ""


def test_texts_of_every_kind_are_found(monkeypatch):
    """Without them there would be no fault either."""
    assert {"This machine", "loading the model", "perhaps"} <= {words for words, _ in wording.said()}
    monkeypatch.setattr(wording, "LONGEST", 0)
    assert len({*wording.check_help()}) > 150
    for name in (
        "README.md",
        "core/errors.py",
        "nodes/comfyui/train.py",
        "web/photos.js",
        "web/docs/FaceLoRATrain.md",
    ):
        assert len({*wording.check(wording.ROOT / name)}) > 10, name
