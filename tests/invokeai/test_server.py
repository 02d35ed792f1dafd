"""The nodes in a real InvokeAI server: a LoRA is trained, registered, found again and drawn with, and errors are told."""

import json
import time
from typing import Any

import pytest
import torch
from PIL import Image

from core.storage.drawn import DRAWN, read_mark
from core.storage.safetensors_file import save_safetensors
from core.version import __version__
from tests.marks import mark_in

from .conftest import BASE
from .server import Edge, InvokeServer

pytestmark = pytest.mark.slow

QUICK = {
    "recipe": "fast", "steps": 4, "check_photos": False, "class_word": "man",
    "settings": "batch_size = 1\nresolution = 72\nprior_prediction = 0\nhold_out = 0\nsample_every = 2\nsample_steps = 2",
}  # fmt: skip
"""The fields of a training run that takes seconds."""


def train(invoke: InvokeServer, photos: list[dict[str, str]], **fields: Any) -> dict[str, Any]:
    return {"type": "facelora_train", "model": invoke.model(BASE), "photos": photos, **QUICK, **fields}


@pytest.fixture(scope="module")
def lora(invoke, photos) -> dict[str, Any]:
    item = invoke.run({"train": train(invoke, photos, name="anna")})
    assert item.status == "completed", item.error
    return item.outputs["train"]["lora"]


def workflow(invoke: InvokeServer) -> dict[str, Any]:
    (found,) = invoke.call("GET", "/api/v1/workflows/?categories=user")["items"]
    return invoke.call("GET", f"/api/v1/workflows/i/{found['workflow_id']}")["workflow"]


def as_graph(workflow: dict[str, Any]) -> tuple[dict[str, dict[str, Any]], list[Edge]]:
    """What the page makes of a workflow when it is queued."""
    nodes = {}
    for node in workflow["nodes"]:
        values = {name: field["value"] for name, field in node["data"]["inputs"].items() if "value" in field}
        nodes[node["id"]] = {"type": node["data"]["type"], **values}
    return nodes, [(e["source"], e["sourceHandle"], e["target"], e["targetHandle"]) for e in workflow["edges"]]


def test_the_pack_comes_with_its_five_nodes_and_one_workflow(invoke):
    (pack,) = invoke.call("GET", "/api/v2/custom_nodes/")["node_packs"]
    assert sorted(pack["node_types"]) == [
        "facelora_headshots", "facelora_likeness", "facelora_photo_report", "facelora_style_pack", "facelora_train",
    ]  # fmt: skip
    assert workflow(invoke)["name"] == "Photos to headshots"


def test_the_workflow_makes_a_lora_and_headshots_and_tells_how_far_it_is(invoke, photos, tmp_path):
    nodes, edges = as_graph(workflow(invoke))
    nodes["train"] |= {"photos": photos, "model": invoke.model(BASE), **QUICK}
    nodes["headshots"] |= {"count": 2, "resolution": 72}
    with invoke.events() as events:
        item = invoke.run(nodes, edges)
    assert item.status == "completed", item.error
    made = item.outputs["train"]
    model = invoke.models()[made["lora"]["name"]]
    assert (model["base"], model["type"], model["trigger_phrases"]) == ("sd-1", "lora", ["sks man"])
    assert model["description"]
    (tmp_path / "cover.webp").write_bytes(invoke.read("GET", f"/api/v2/models/i/{model['key']}/image"))
    assert read_mark(tmp_path / "cover.webp") == DRAWN
    drawn = item.outputs["headshots"]
    assert len(drawn["pictures"]) == len(drawn["likenesses"]) == 2
    assert drawn["likenesses"] == sorted(drawn["likenesses"])
    name = drawn["pictures"][0]["image_name"]
    kept = invoke.call("GET", f"/api/v1/images/i/{name}/metadata")
    assert "sks man" in kept["positive_prompt"] and kept["loras"][0]["model"]["key"] == model["key"]
    (tmp_path / "a.png").write_bytes(invoke.picture(name))
    assert mark_in(tmp_path / "a.png") == (DRAWN, f"FaceLoRA {__version__}")  # and signed
    with Image.open(tmp_path / "a.png") as image:
        assert json.loads(image.info["invokeai_metadata"]) == kept
    assert invoke.call("GET", f"/api/v1/images/i/{name}")["image_category"] == "general"
    said = [event["message"] for event in events]
    assert any(text.startswith("step 4 of 4, loss 0.") and text.endswith(" left") for text in said), said
    assert any(event["image"] for event in events) and any(text.startswith("pictures: ") for text in said)
    assert not list((invoke.folder / "cache" / "headshots").iterdir())


def test_a_cancelled_run_stops_at_once_and_goes_on_when_it_is_queued_again(invoke, photos):
    node = train(
        invoke,
        photos,
        name="long",
        steps=40,
        settings=QUICK["settings"].replace("sample_every = 2", "sample_every = 0"),
    )
    with invoke.events() as events:
        item = invoke.queue({"train": node})
        invoke.wait_for(lambda: any(event["message"].startswith("step ") for event in events))
        invoke.call("PUT", f"/api/v1/queue/default/i/{item}/cancel")
        cancelled = time.monotonic()
        invoke.wait_for(lambda: not invoke.call("GET", "/api/v1/queue/default/status")["processor"]["is_processing"])
        assert time.monotonic() - cancelled < 10
        assert invoke.wait(item).status == "canceled" and "long" not in invoke.models()
        last = max(step_of(event) for event in events)
        assert last < 40
        mark = len(events)
        again = invoke.run({"train": node})
    assert again.status == "completed", again.error
    assert min(step_of(event) for event in events[mark:] if step_of(event)) > last


def step_of(event: dict[str, Any]) -> int:
    """The step that a message tells of; 0 where it tells of none."""
    words = event["message"].split()
    return int(words[1]) if words[0] == "step" else 0


def test_what_is_trained_is_found_again(invoke, photos, lora):
    item = invoke.run({"train": train(invoke, photos, name="anna")})
    assert item.outputs["train"]["lora"] == lora and "already trained" in item.outputs["train"]["report"]
    other = invoke.run({"train": train(invoke, photos, name="anna", training_seed=2)})
    assert other.outputs["train"]["lora"]["name"] == "anna-2"


def test_invokeais_own_nodes_draw_with_the_lora(invoke, lora):
    def drawn(weight: float) -> bytes:
        nodes = {
            "model": {"type": "main_model_loader", "model": invoke.model(BASE)},
            "apply": {"type": "lora_loader", "lora": lora, "weight": weight},
            "positive": {"type": "compel", "prompt": "a photo of sks man"}, "negative": {"type": "compel", "prompt": ""},
            "noise": {"type": "noise", "seed": 1, "width": 256, "height": 320},
            "denoise": {"type": "denoise_latents", "steps": 3, "cfg_scale": 2.5}, "picture": {"type": "l2i"},
        }  # fmt: skip
        edges = [
            ("model", "unet", "apply", "unet"), ("model", "clip", "apply", "clip"), ("model", "vae", "picture", "vae"),
            ("apply", "clip", "positive", "clip"), ("apply", "clip", "negative", "clip"),
            ("apply", "unet", "denoise", "unet"), ("noise", "noise", "denoise", "noise"),
            ("positive", "conditioning", "denoise", "positive_conditioning"),
            ("negative", "conditioning", "denoise", "negative_conditioning"), ("denoise", "latents", "picture", "latents"),
        ]  # fmt: skip
        item = invoke.run(nodes, edges)
        assert item.status == "completed", item.error
        return invoke.picture(item.outputs["picture"]["image"]["image_name"])

    assert drawn(0.0) != drawn(4.0)
    assert "does not match" not in invoke.log()


def test_a_style_pack_gives_invokeais_nodes_each_picture_in_turn(invoke):
    nodes = {
        "numbers": {"type": "range_of_size", "size": 3}, "each": {"type": "iterate"}, "prompts": {"type": "collect"},
        "style": {"type": "facelora_style_pack", "model": invoke.model(BASE), "count": 3, "subject": "sks man"},
    }  # fmt: skip
    edges = [
        ("numbers", "collection", "each", "collection"), ("each", "item", "style", "number"),
        ("style", "prompt", "prompts", "item"),
    ]  # fmt: skip
    item = invoke.run(nodes, edges)
    assert item.status == "completed", item.error
    assert item.outputs["prompts"]["collection"] == item.outputs["style"]["prompts"]
    assert len(set(item.outputs["style"]["seeds"])) == 3


def test_photos_are_reported_on_and_pictures_sorted_by_likeness(invoke, photos, tmp_path):
    board = invoke.board("person")
    for photo in photos:
        invoke.call("POST", "/api/v1/board_images/", {"board_id": board, **photo})
    empty = tmp_path / "grey.png"
    Image.new("RGB", (200, 200), "grey").save(empty)
    (grey,) = invoke.upload([empty], board)
    nodes = {
        "report": {"type": "facelora_photo_report", "photo_board": {"board_id": board}},
        "likeness": {"type": "facelora_likeness", "pictures": [grey, photos[0]], "photos": photos[1:]},
    }
    item = invoke.run(nodes)
    assert item.status == "completed", item.error
    report, likeness = item.outputs["report"], item.outputs["likeness"]
    assert "no face" in report["report"] and report["photo_names"]
    assert grey["image_name"] not in report["photo_names"]
    assert likeness["pictures"] == [photos[0], grey] and likeness["likenesses"][0] > 0.5 > 0 > likeness["likenesses"][1]


def test_what_is_wrong_is_an_error_of_the_node_in_one_sentence(invoke, photos, lora, tmp_path):
    Image.new("RGB", (300, 300), "grey").save(tmp_path / "grey.png")
    no_faces = invoke.upload([tmp_path / "grey.png"] * 3)
    flux = tmp_path / "flux.safetensors"
    tensors = {
        "img_in.weight": (8, 64),
        "double_blocks.0.img_attn.norm.key_norm.scale": (8,),
        "guidance_in.in_layer.bias": (8,),
    }
    save_safetensors(flux, {name: torch.zeros(size) for name, size in tensors.items()})
    other = invoke.add_model(flux, "another kind")
    assert other["base"] == "flux", other

    def error(**fields: Any) -> str:
        return invoke.run({"train": train(invoke, photos) | fields}).error

    assert error(photos=no_faces, check_photos=True) == (
        "BadPhoto: 0 of 3 usable: all without a face. To train on all photos anyway: turn off Check Photos"
    )
    assert (
        error(photos=None) == "BadPhoto: no photos: add 10 to 20 photos of one person, or choose a board that has them"
    )
    assert error(photos=None, photo_board={"board_id": invoke.board("empty")}).startswith("BadPhoto: no photos")
    assert error(model=other) == "BadConfig: model: another kind is a flux main. Choose a main model for SD1.5 or SDXL"
    assert error(model=lora).startswith("BadConfig: model: anna is a sd-1 lora")
    assert error(settings="rnk = 3").startswith("BadConfig: ") and "rank" in error(settings="rnk = 3")
    assert error(name="../x").startswith("BadConfig: name '../x'")


def test_a_pack_that_is_removed_and_installed_again_works_without_a_restart(invoke, photos, clone):
    assert invoke.call("DELETE", "/api/v2/custom_nodes/ComfyUI-FaceLoRA")["success"]
    assert json.dumps(invoke.call("GET", "/api/v1/workflows/?categories=user")["items"]) == "[]"
    assert invoke.install_pack(clone)["success"]
    assert invoke.run({"report": {"type": "facelora_photo_report", "photos": photos}}).status == "completed"
