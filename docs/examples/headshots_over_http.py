"""Queue the app in a running ComfyUI: upload photos, train, draw, and download the headshots with their likeness.

    python docs/examples/headshots_over_http.py http://127.0.0.1:8188 app.json Anna photos/*.jpg

`app.json` is a workflow that you have exported in ComfyUI with Workflow > Export (API), such as the template "1 Face photos to
headshots". Only Python's standard library is needed. Train only people who have agreed to it.
"""

import json
import sys
import time
import urllib.parse
import urllib.request
import uuid
from pathlib import Path
from typing import Any


def ask(address: str, body: bytes | None = None, kind: str = "application/json") -> bytes:
    request = urllib.request.Request(address, body, {"Content-Type": kind})
    with urllib.request.urlopen(request) as answer:
        return answer.read()


def upload(server: str, photo: Path, person: str, folder: str) -> str:
    """Add a photo as the app does when you drop it, and return its name in ComfyUI's input folder."""
    boundary = uuid.uuid4().hex
    texts = "".join(
        f'--{boundary}\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n{value}\r\n'
        for name, value in {"person": person, "folder": folder}.items()
    )
    head = f'{texts}--{boundary}\r\nContent-Disposition: form-data; name="file"; filename="{photo.name}"\r\n\r\n'
    body = head.encode() + photo.read_bytes() + f"\r\n--{boundary}--\r\n".encode()
    return json.loads(ask(f"{server}/facelora/photos", body, f"multipart/form-data; boundary={boundary}"))["name"]


def fill(graph: dict[str, Any], person: str, photos: list[str]) -> None:
    """Write the person's name and photos into the graph. All other inputs are set in the same way."""
    for node in graph.values():
        if node["class_type"] == "FaceLoRALoadPhotos":
            node["inputs"] |= {"pictures": "\n".join(photos), "folder": "(no folder)"}
        if node["class_type"] == "FaceLoRATrain":
            node["inputs"]["name"] = person


def run(server: str, graph: dict[str, Any]) -> dict[str, Any]:
    """Queue the graph, print progress until it ends, and return what its nodes have saved and told."""
    prompt = json.loads(ask(f"{server}/prompt", json.dumps({"prompt": graph}).encode()))["prompt_id"]
    while prompt not in (history := json.loads(ask(f"{server}/history/{prompt}"))):
        states = [one for one in json.loads(ask(f"{server}/facelora/training")) if one["prompt"] == prompt]
        for state in states:
            print(state["phase"], f"step {state['step']} of {state['steps']}" if "step" in state else "")
        time.sleep(2)
    status = history[prompt]["status"]
    if status["status_str"] != "success":
        raise SystemExit(str(status["messages"][-1]))
    return history[prompt]["outputs"]


def main() -> None:
    server, workflow, person, *files = sys.argv[1:]
    photos: list[str] = []
    for file in map(Path, files):
        folder = photos[0].rpartition("/")[0] if photos else ""  # the folder that the first photo was given
        photos.append(upload(server, file, person, folder))
    graph = json.loads(Path(workflow).read_text(encoding="utf-8"))
    fill(graph, person, photos)
    for output in run(server, graph).values():
        if "likeness" not in output:
            continue
        for image, likeness, lora in zip(output["images"], output["likeness"], output["lora_name"], strict=True):
            with Path(image["filename"]).open("xb") as file:  # an error if there is a file of that name
                file.write(ask(f"{server}/view?{urllib.parse.urlencode(image)}"))
            print(f"{image['filename']}: likeness {likeness}, drawn with {lora}")


if __name__ == "__main__":
    main()
