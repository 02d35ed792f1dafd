"""The nodes for InvokeAI beside a stand-in for it: their fields, their workflow, and what they do with a model and photos."""

import importlib
import json
import shutil
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from core.demo import BASE_FILE
from core.demo.people import person_photos
from core.errors import FaceLoraError
from core.lora.file import LoraFile
from core.storage.cache_folder import cache_folder, clear_cache
from core.storage.drawn import DRAWN
from core.storage.signature import inspect_signature
from core.version import __version__
from tests.marks import mark_in
from tests.photos.test_report import ONLY_PHOTO
from tests.tooling import write_photos

from . import standin
from .standin import NODES, ROOT, BaseModelType, BoardField, ImageField, InvocationContext, ModelType, fields_of

WORKFLOW = ROOT / "nodes" / "invokeai" / "photos_to_headshots.json"
QUICK = {
    "recipe": "fast", "steps": 3, "name": "anna", "check_photos": False,
    "settings": "batch_size = 1\nprior_prediction = 0\nhold_out = 0\nsample_every = 3\nsample_steps = 2",
}  # fmt: skip


@pytest.fixture(scope="module")
def pack(tmp_path_factory) -> Iterator[Any]:
    before = set(sys.modules)
    yield standin.import_pack(tmp_path_factory.mktemp("root"))
    for name in set(sys.modules) - before:
        if name.partition(".")[0] in ("invokeai", "ComfyUI-FaceLoRA"):
            del sys.modules[name]


@pytest.fixture
def desk(pack, tmp_path) -> SimpleNamespace:
    """A context with the demo's base model and five photos."""
    context = InvocationContext(tmp_path)
    (tmp_path / "base.safetensors").symlink_to(BASE_FILE)
    write_photos(tmp_path / "person", count=5, scale=3)
    photos = [ImageField(str(path.relative_to(tmp_path))) for path in sorted((tmp_path / "person").glob("*.png"))]
    model = context.add_model("base.safetensors", BaseModelType.StableDiffusion1, ModelType.Main)
    return SimpleNamespace(
        context=context, model=model, photos=photos, errors=sys.modules["ComfyUI-FaceLoRA.core.errors"]
    )


def train(desk: SimpleNamespace, **fields: Any) -> Any:
    node = NODES["facelora_train"](**{"model": desk.model, "photos": desk.photos, **QUICK, **fields})
    return node.invoke(desk.context)


def test_the_pack_registers_its_nodes_where_invokeai_imports_it_and_nowhere_else(pack):
    assert set(NODES) == {
        "facelora_train", "facelora_headshots", "facelora_style_pack", "facelora_photo_report", "facelora_likeness",
    }  # fmt: skip
    assert {one.__module__.partition(".")[0] for one in NODES.values()} == {"ComfyUI-FaceLoRA"}


def test_every_field_says_what_it_is_in_a_sentence_that_fits_a_tooltip(pack):
    outputs = [kind.invoke.__annotations__["return"] for kind in NODES.values()]
    for kind in (*NODES.values(), *outputs):
        fields = fields_of(kind)
        assert fields
        for name, one in fields.items():
            assert 8 < len(one.options["description"]) < 200 and one.options["description"][-1] in ".…", (kind, name)


def test_the_workflow_fits_the_nodes_and_shows_five_of_their_fields(pack):
    workflow = json.loads(WORKFLOW.read_text(encoding="utf-8"))
    kinds = {node["id"]: NODES[node["data"]["type"]] for node in workflow["nodes"]}
    for node in workflow["nodes"]:
        fields, inputs = fields_of(kinds[node["id"]]), node["data"]["inputs"]
        assert set(inputs) == set(fields) and node["data"]["version"] == kinds[node["id"]].version
        given = {name: one["value"] for name, one in inputs.items() if "value" in one}
        assert given == {
            name: one.default for name, one in fields.items() if one.default not in (None, standin.REQUIRED)
        }
    for edge in workflow["edges"]:
        output = kinds[edge["source"]].invoke.__annotations__["return"]
        assert edge["sourceHandle"] in fields_of(output) and edge["targetHandle"] in fields_of(kinds[edge["target"]])
    shown = [
        one["data"]["fieldIdentifier"] for one in workflow["form"]["elements"].values() if one["type"] == "node-field"
    ]
    assert len(shown) == 5 and all(one["fieldName"] in fields_of(kinds[one["nodeId"]]) for one in shown)


def test_invokeai_takes_no_other_file_of_the_pack_for_a_workflow():
    """It imports every JSON with nodes and edges."""
    folders = [ROOT / name for name in ("core", "docs", "locales", "nodes", "subgraphs", "tools", "web", "workflows")]
    files = [file for folder in folders for file in folder.rglob("*.json")]
    read = {file: json.loads(file.read_text(encoding="utf-8")) for file in files}
    assert [
        file for file, content in read.items() if isinstance(content, dict) and {"nodes", "edges"} <= content.keys()
    ] == [WORKFLOW]


def test_a_trained_lora_is_registered_with_its_words_and_a_cover_and_then_found(desk):
    made = train(desk, class_word="man")
    config = desk.context.configs[made.lora.key]
    assert config.path == "facelora/anna.safetensors" and config.trigger_phrases == {"sks man"} == {made.trigger_phrase}
    assert mark_in(desk.context.folder / f"{config.key}.webp") == (DRAWN, f"FaceLoRA {__version__}")
    assert made.photo_names == [photo.image_name for photo in desk.photos]
    assert [share for message, share, _ in desk.context.shown if message.startswith("step 3 of 3, loss")] == [1.0]
    assert desk.context.shown[-1][2] is not None, "no sample was shown"
    again = train(desk, class_word="man")
    assert again.lora == made.lora and again.report.startswith("anna: already trained")


def test_drawn_pictures_are_trained_on_too_and_are_not_compared_with(desk):
    names = ("drawn.png", "other.png")
    for name, picture in zip(names, (person_photos(35)[8], person_photos(36)[0]), strict=True):
        picture.resize((276, 336)).save(desk.context.folder / name)
    made = train(desk, check_photos=True, drawn_photos=[ImageField(name) for name in names])
    file = desk.context.folder / desk.context.configs[made.lora.key].path
    assert LoraFile.read(file).metadata["ss_num_train_images"] == "6"
    assert "other.png is left out: this seems to be someone else" in made.report
    assert made.photo_names == [photo.image_name for photo in desk.photos]


def test_a_lora_trained_after_one_was_deleted_by_hand_has_its_own_words(desk):
    before = train(desk, class_word="man").lora
    (desk.context.folder / "facelora" / "anna.safetensors").unlink()
    after = train(desk, class_word="woman").lora
    assert after.key != before.key and before.key not in desk.context.configs
    assert [cover.stem for cover in desk.context.folder.glob("*.webp")] == [after.key]
    assert desk.context.configs[after.key].trigger_phrases == {"sks woman"}


def test_a_cancelled_run_ends_as_cancelled_and_goes_on(desk):
    desk.context.cancel_at = "step 1 of"
    with pytest.raises(standin.CanceledException):
        train(desk, steps=4)
    assert not list(desk.context.folder.glob("facelora/*.safetensors"))
    desk.context.cancel_at, desk.context.shown = "", []
    assert train(desk, steps=4).lora.name == "anna"
    assert not any(message.startswith("step 1 of") for message, *_ in desk.context.shown)


def test_headshots_are_saved_with_what_made_them_the_most_alike_last(desk):
    lora = train(desk, cover=False).lora
    assert not desk.context.covers
    node = NODES["facelora_headshots"](
        model=desk.model, lora=lora, count=2, styles="", resolution=72, photos=desk.photos, first_seed=7
    )
    drawn = node.invoke(desk.context)
    assert [one.image_name for one in drawn.pictures] == list(desk.context.saved)
    assert drawn.likenesses == sorted(drawn.likenesses)
    assert {values["seed"] for values in desk.context.saved.values()} == {7, 8}
    for name, values in desk.context.saved.items():
        assert mark_in(desk.context.folder / name) == (DRAWN, f"FaceLoRA {__version__}")
        for claim in inspect_signature(desk.context.folder / name)["history"]:
            assert [model.split()[0] for model in claim["made_with"]] == ["base", "LoRA"]
        with Image.open(desk.context.folder / name) as image:
            assert json.loads(image.info["invokeai_metadata"])["seed"] == values["seed"]
    assert all("sks person" in values["positive_prompt"] for values in desk.context.saved.values())
    assert drawn.report == f"2 pictures, highest likeness {drawn.likenesses[-1]:.2f}"


def test_headshots_report_why_there_is_no_likeness(desk, monkeypatch):
    photos = sys.modules["ComfyUI-FaceLoRA.nodes.invokeai.photos"]
    monkeypatch.setattr(photos, "faces_if_installed", lambda on_warning: on_warning("no face networks"))
    node = NODES["facelora_headshots"](
        model=desk.model, lora=train(desk).lora, count=2, styles="", resolution=72, photos=desk.photos
    )
    assert node.invoke(desk.context).report == "2 pictures\nno face networks"


def test_reading_the_model_for_headshots_is_shown_and_can_be_cancelled(desk):
    node = NODES["facelora_headshots"](model=desk.model, lora=train(desk).lora, count=2, styles="", resolution=72)
    desk.context.shown, desk.context.cancel_at = [], "reading the model"
    with pytest.raises(standin.CanceledException):
        node.invoke(desk.context)
    assert not list(cache_folder().glob("headshots/*"))


def test_a_pack_that_cannot_be_used_is_named_at_the_field_for_it(pack):
    module = sys.modules["ComfyUI-FaceLoRA.nodes.invokeai.style_pack"]
    folder = module.services.root_folder() / "style_packs"
    folder.mkdir()
    (folder / "mine.json").write_text("[")
    try:
        fields = fields_of(importlib.reload(module).StylesInvocation)
    finally:
        shutil.rmtree(folder)
        importlib.reload(module)
    assert "\nNot used: mine.json: " in fields["style_pack"].options["description"]


def test_pictures_of_a_cancelled_batch_are_deleted_with_the_cache(desk):
    desk.context.cancel_at = "pictures: 1 of 2"
    node = NODES["facelora_headshots"](model=desk.model, lora=train(desk).lora, count=2, styles="", resolution=72)
    with pytest.raises(standin.CanceledException):
        node.invoke(desk.context)
    assert list(cache_folder().glob("headshots/*/*.png"))
    clear_cache()
    assert not cache_folder().exists()


@pytest.mark.parametrize(("name", "steps", "guidance"), [("base", 20, 6.0), ("base_hyper", 8, 1.0)])
def test_a_style_pack_gives_a_distilled_models_own_steps(desk, name: str, steps: int, guidance: float):
    file = desk.context.folder / f"{name}.safetensors"
    if not file.exists():
        file.symlink_to(BASE_FILE)
    model = desk.context.add_model(file.name, BaseModelType.StableDiffusion1, ModelType.Main)
    found = NODES["facelora_style_pack"](model=model, count=2).invoke(desk.context)
    assert (found.steps, found.cfg_scale) == (steps, guidance)


def test_a_board_gives_the_photos_too_and_a_picture_on_both_counts_once(desk):
    desk.context.on_boards["b"] = [photo.image_name for photo in desk.photos[1:]]
    node = NODES["facelora_photo_report"](photos=desk.photos[:2], photo_board=BoardField("b"))
    assert node.image_names(desk.context) == [photo.image_name for photo in desk.photos]
    report = node.invoke(desk.context)
    assert report.sheet.image_name in desk.context.saved and "usable" in report.report


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"photos": None}, "no photos: add 10 to 20 photos of one person, or choose a board that has them"),
        ({"photos": [ImageField("grey.png")] * 2, "check_photos": True}, "0 of 1 usable"),
        (
            {"photos": [ImageField("two.png")], "check_photos": True},
            "0 of 1 usable: 2 people, and no other photo to tell who is meant: crop it.*turn off Check Photos",
        ),
        (
            {"photos": [ImageField("drawing.png")], "check_photos": True, "settings": "resolution = 512"},
            "0 of 1 usable: this seems to be a drawing",
        ),
        ({"photos": [ImageField("gone.png")]}, r"gone\.png: this photo is not in your gallery any more"),
        ({"settings": "rnk = 3"}, "rank"),
        ({"settings": "rank 3"}, "each line is NAME = VALUE"),
        ({"name": "../anna"}, "give a file name"),
    ],
)
def test_an_error_is_one_sentence(desk, fields, message):
    Image.new("RGB", (200, 200), "grey").save(desk.context.folder / "grey.png")
    ONLY_PHOTO["two people"][0]().save(desk.context.folder / "two.png")
    ONLY_PHOTO["a drawing"][0]().save(desk.context.folder / "drawing.png")
    with pytest.raises(desk.errors.FaceLoraError, match=message):
        train(desk, **fields)


def test_a_model_of_another_kind_is_refused_by_name(desk):
    other = desk.context.add_model("dev.safetensors", BaseModelType.Flux, ModelType.Main)
    with pytest.raises(desk.errors.BadConfig, match=r"dev is a flux main\. Choose a main model for SD1\.5 or SDXL"):
        train(desk, model=other)


def test_a_service_that_invokeai_lacks_is_named_with_the_version_that_has_it(desk):
    desk.context._services.model_images = None
    with pytest.raises(
        desk.errors.MissingPackage, match=r"lacks the service model_images: these nodes were made for InvokeAI 6\.14\.2"
    ):
        train(desk)


def test_the_packs_errors_are_not_those_of_another_copy_of_the_library(desk):
    assert not issubclass(desk.errors.FaceLoraError, FaceLoraError)
