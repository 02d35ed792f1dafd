"""The people whom each user has trained: a record of every training run, until its user deletes it with its files."""

# pyright: reportMissingImports=false

import hashlib
import json
import threading
import time
from collections.abc import Collection, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import folder_paths

from ...core.errors import BadConfig, BadFile, InUse
from ...core.lora.embeddings import embedding_files
from ...core.lora.file import LoraFile
from ...core.lora.sidecars import SIDECARS
from ...core.storage.cache_folder import cache_folder, content_key, made_folder
from ...core.storage.files import read_json, write_text
from ...core.storage.locks import locked
from ...core.training.encode import forget_latents
from ...core.training.trained_file import files_of, forget_run
from .dropped import delete_folder, own_root
from .folders import embedding_name

Record = dict[str, Any]
RUNNING = "running"
DRAWING = "drawing"
"""The phase of a finished training run whose prompt still runs, for example to draw headshots."""
PUBLIC = ("key", "name", "phase", "begun", "picture", "file", "likeness", "likeness_word")
"""The fields of a record that the list shows."""
_live: set[str] = set()
"""The keys of the training runs in this process."""
_lock = threading.RLock()


def note(user: str | None, key: str, **facts: Any) -> None:
    """Add facts to the user's record of a training run, by the key of its job. Without a user, nothing is recorded."""
    if user is None:
        return
    with _lock:
        if "phase" in facts:
            _live.discard(key)
        if facts.get("phase") == RUNNING:
            _live.add(key)
        record = (
            {"user": user, "key": key, "begun": time.time(), "headshots": {}} | _record_in(_file(user, key)) | facts
        )
        with suppress(BadFile):  # Training continues on a full disk.
            made_folder("panels")
            write_text(_file(user, key), json.dumps(record))


def add_headshots(user: str | None, key: str, digests: Mapping[str, str]) -> None:
    """Add the digests of pictures, by name below the output folder, to the record of the run whose LoRA drew them."""
    record = _record_in(_file(user, key)) if user is not None else {}
    if record:
        note(user, key, headshots=record["headshots"] | dict(digests))


def of(user: str | None, prompts: Collection[str]) -> list[Record]:
    """Return what the list shows of the user's training runs, the latest first. `prompts` are the ids of those that run now."""
    live = set(_live)
    records = [record for record in _all() if user is not None and record["user"] == user]
    live |= _live  # a run may begin or end while the records are read
    shown = []
    for record in sorted(records, key=lambda record: -record["begun"]):
        phase = record.get("phase")
        if phase == RUNNING and record["key"] not in live:
            phase = "stopped"
        elif phase == "done" and record["run"]["prompt"] in prompts:
            phase = DRAWING
        counts = {"photos": len(record["photos"]), "headshots": len(record["headshots"])}
        others = {"phase": phase, "can_open": record.get("graph") is not None}
        shown.append({name: record.get(name) for name in PUBLIC} | counts | others)
    return shown


def graph_of(user: str | None, key: str) -> Any:
    """Return the page's graph that a training run of the user was queued with; None if there is none."""
    return None if user is None else _record_in(_file(user, key)).get("graph")


def delete(user: str | None, key: str, prompts: Collection[str]) -> tuple[dict[str, Any], list[str]]:
    """Delete a training run of the user: its LoRA, headshots, cached files, and the photos that were dropped for it.

    Files that another training run uses are kept. `prompts` are the ids of those that run now. Returns the prompt, workflow
    and node of the run, and what was deleted. Raises BadConfig if the user has no such training run, or if its prompt runs.
    """
    with _lock:
        record = _record_in(_file(user, key)) if user is not None else {}
        if not record:
            raise BadConfig("you have no such training run. Reload the list")
        if key in _live:
            raise BadConfig(f"{record['name']} is being trained. Cancel the training run first")
        if record["run"]["prompt"] in prompts:
            raise BadConfig(f"{record['name']}: headshots are being drawn. Cancel the run first, or wait until it ends")
        others = [other for other in _all() if (other["user"], other["key"]) != (user, key)]
        deleted = []
        for name, digest in record["headshots"].items():
            if digest and digest_of(name) == digest:  # ComfyUI gives the name of a deleted picture to another one.
                (Path(folder_paths.get_output_directory()) / name).unlink()
                deleted.append(f"output/{name}")
        if all(other["key"] != key for other in others):
            deleted += _delete_loras(key, record["name"])
            forget_run(key)
        kept = {digest for other in others for digest in other["digests"]}
        forget_latents(set(record["digests"]) - kept)
        # The photos that were dropped for it, except those in folders that other runs use.
        photos, root = [photo for other in others for photo in other["photos"]], own_root(record["user"])
        for folder in sorted({name.rpartition("/")[0] for name in record["photos"]}):
            if folder.rpartition("/")[0] == root and not any(name.startswith(f"{folder}/") for name in photos):
                deleted += [f"input/{name}" for name in delete_folder(folder)]
        _file(user, key).unlink()
        return record["run"], deleted


def digest_of(name: str) -> str:
    """Return the digest of a picture by its name below the output folder; "" for a file that is missing or elsewhere."""
    root = Path(folder_paths.get_output_directory()).resolve()
    path = (root / name).resolve()
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_relative_to(root) and path.is_file() else ""


def _delete_loras(key: str, name: str) -> list[str]:
    """Delete the files of a training run from the folders of LoRAs, of embeddings, and of Save Face LoRA.

    Files that are found through another one are deleted before it, so that a second attempt finds what is left of them.
    """
    folders = [Path(folder) for folder in folder_paths.get_folder_paths("loras")]
    with suppress(InUse), locked(folders[0] / f"{name}.safetensors"):
        pass  # this deletes the lock file that a killed server left
    words = Path(folder_paths.get_folder_paths("embeddings")[0])
    deleted = []
    for path in reversed(files_of(key, [*folders, Path(folder_paths.get_output_directory()) / "loras"])):
        lora = LoraFile.read(path)
        names = [f"{embedding_name(lora, embedding)}.safetensors" for embedding in embedding_files(lora).values()]
        del lora  # Windows can't delete a file that is still open
        for file in (*map(path.with_suffix, SIDECARS), *(words / name for name in names), path):
            if file.is_file():
                file.unlink()
                deleted.append(file.name)
    return deleted


def _file(user: str | None, key: str) -> Path:
    return cache_folder() / "panels" / f"{content_key('person', user, key)}.json"


def _record_in(file: Path) -> Record:
    with suppress(BadFile):
        record = read_json(file)
        if isinstance(record, Mapping) and {"user", "key", "begun", "run", "photos", "digests"} <= record.keys():
            return dict(record)
    return {}


def _all() -> list[Record]:
    """Return the records of all users. Other files in the folder are ignored."""
    files = (cache_folder() / "panels").glob("*.json")
    return [record for record in map(_record_in, files) if record]
