"""The people whom each user has trained: a record of every training run and name, until its user deletes it with its files.

A training run that is repeated under another name makes a copy of its LoRA, which has a record of its own.
"""

# pyright: reportMissingImports=false

import hashlib
import io
import json
import re
import secrets
import threading
import time
import zipfile
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import Any

import folder_paths
from PIL import Image

from ....core.errors import BadConfig, BadFile, InUse
from ....core.lora.embeddings import embedding_files
from ....core.lora.file import LoraFile
from ....core.lora.sidecars import SIDECARS
from ....core.photos.reading import DAMAGED, MASK_ENDING
from ....core.storage.cache_folder import cache_folder, content_key, made_folder
from ....core.storage.drawn import DRAWN, jpeg_url
from ....core.storage.files import read_json, write_text
from ....core.storage.locks import locked
from ....core.storage.safetensors_file import SafetensorsFile, copy_with_metadata
from ....core.training.encode import forget_latents
from ....core.training.store import lora_path
from ....core.training.trained_file import files_of, forget_run
from ..folders import embedding_name, write_embedding
from .dropped import delete_dropped, folders_of, own_root, photos_in
from .runs import DONE, STOPPED

Record = dict[str, Any]
PICTURE_SIDE = 256
"""The longer side of a person's picture in the list, in pixels."""
RUNNING = "running"
DRAWING = "drawing"
"""The phase of a finished training run whose prompt still runs, for example to draw headshots."""
UNTRAINED = "untrained"
"""The phase of dropped photos that no training run has."""
PUBLIC = ("key", "name", "begun", "file", "likeness", "likeness_word")
"""The fields of a record that the list shows."""
_STEP = re.compile(r"-step\d{6,}(-\d+)?$")
"""The end of the name of a step's LoRA."""


class People:
    """The records of all users' training runs, kept in the cache folder. A record is for its user alone: others find none."""

    def __init__(self) -> None:
        self._live: set[str] = set()  # the keys of the records whose training runs are in this process
        self._lock = threading.RLock()

    def key_of(self, user: str | None, job: str, name: str) -> str:
        """Return the key of the user's record of a training run, by its job's key, under a name."""
        records = [record for record in _all() if record["user"] == user and _job(record) == job]
        known = next((record["key"] for record in records if record["name"] == name), "")
        return known or (secrets.token_hex(32) if records else job)

    def note(self, user: str | None, key: str, **facts: Any) -> None:
        """Add facts to the user's record with that key. Without a user, nothing is recorded."""
        if user is None:
            return
        with self._lock:
            if "phase" in facts:
                self._live.discard(key)
            if facts.get("phase") == RUNNING:
                self._live.add(key)
            record = (
                {"user": user, "key": key, "begun": time.time(), "headshots": {}} | _record_in(_file(user, key)) | facts
            )
            with suppress(BadFile):  # Training continues on a full disk.
                made_folder("panels")
                write_text(_file(user, key), json.dumps(record))

    def add_headshots(
        self,
        user: str | None,
        key: str,
        digests: Mapping[str, str],
        scores: Mapping[str, float | None],
        styles: Mapping[str, tuple[str, str]],
    ) -> None:
        """Add pictures to the record of the run whose LoRA drew them, by name below the output folder.

        `styles` are packs and styles. The list shows the picture with the highest likeness.
        """
        record = _record_of(user, key)
        if not record:
            return
        # Any headshot is better than none if likeness is unknown, but not one without a face (-1).
        likeness = {name: -0.99 if score is None else score for name, score in scores.items()}
        styled = {name: [*style, likeness[name]] for name, style in styles.items()}
        facts: Record = {
            "headshots": record["headshots"] | dict(digests),
            "styles": record.get("styles", {}) | styled,
        }
        best = max(likeness, key=lambda name: likeness[name])
        if likeness[best] > record.get("shown_likeness", -1.0):
            with suppress(*DAMAGED), Image.open(Path(folder_paths.get_output_directory()) / best) as image:
                facts |= {"headshot": jpeg_url(image, PICTURE_SIDE, DRAWN), "shown_likeness": likeness[best]}
        self.note(user, key, **facts)

    def of(self, user: str | None, prompts: Collection[str]) -> list[Record]:
        """Return what the list shows of the user's training runs, the latest first, and of dropped photos without one.

        `prompts` are the ids of those that run now.
        """
        live = set(self._live)
        everyone = _all()
        records = [record for record in everyone if user is not None and record["user"] == user]
        live |= self._live  # a run may begin or end while the records are read
        shown = []
        for record in sorted(records, key=lambda record: -record["begun"]):
            phase = record.get("phase")
            if phase == RUNNING and record["key"] not in live:
                phase = STOPPED
            elif phase == DONE and record["run"]["prompt"] in prompts:
                phase = DRAWING
            counts = {"photos": len(record["photos"]), "headshots": len(record["headshots"])}
            picture = record.get("headshot", record.get("picture"))
            others = {"phase": phase, "can_open": record.get("graph") is not None, "picture": picture}
            shown.append({name: record.get(name) for name in PUBLIC} | counts | others)
        return shown + ([] if user is None else _untrained(user, everyone))

    def graph_of(self, user: str | None, key: str) -> Any:
        """Return the page's graph that a training run of the user was queued with; None if there is none."""
        return _record_of(user, key).get("graph")

    def styles_of(self, user: str | None, key: str) -> list[dict[str, str]]:
        """Return the headshot of each style with the highest likeness: its pack, style, and name below the output folder."""
        record, best = (
            _record_of(user, key),
            dict[tuple[str, str], tuple[float, str]](),
        )
        for name in _headshots(record) if record.get("styles") else ():
            if name in record["styles"]:
                pack, style, likeness = record["styles"][name]
                best[pack, style] = max(best.get((pack, style), (-1.0, "")), (likeness, name))
        return [{"pack": pack, "style": style, "name": name} for (pack, style), (_, name) in best.items() if name]

    def headshots_zip(self, user: str | None, key: str) -> tuple[str, bytes]:
        """Return the name of a training run of the user, and a ZIP file of its headshots."""
        record, data = _record_of(user, key), io.BytesIO()
        names = _headshots(record) if record else []
        folders = {name.rpartition("/")[0] for name in names}
        with zipfile.ZipFile(data, "w") as archive:
            for name in names:  # ComfyUI numbers the pictures of each folder from 1
                archive.write(
                    Path(folder_paths.get_output_directory()) / name, Path(name).name if len(folders) == 1 else name
                )
        return _stem(record) if record else "headshots", data.getvalue()

    def files_to_delete(self, user: str | None, key: str, queued: Collection[str]) -> Record:
        """Return what `delete` would delete: the names of LoRAs, and how many headshots and dropped photos."""
        with self._lock:
            record = _record_of(user, key)
            if not record:
                return {"loras": [], "headshots": 0, "photos": 0}
            others = _others(record)
            return {
                "loras": [path.name for path in _loras(record, others)],
                "headshots": len(_own_headshots(record, others)),
                "photos": sum(len(photos_in(folder)) for folder in _folders(record, others, queued)),
            }

    def delete(
        self, user: str | None, key: str, prompts: Collection[str], queued: Collection[str]
    ) -> tuple[dict[str, Any], list[str]]:
        """Delete a training run of the user: its LoRA, headshots, cached files, and the photos that were dropped for it.

        Files that another record has are kept, and `queued` photos and folders. `prompts` are the ids of those that run now.
        Returns the prompt, workflow and node of the run, and what was deleted. Raises BadConfig if the user has no such
        training run, or if its prompt runs.
        """
        with self._lock:
            record = self._at_rest(user, key, prompts)
            others, deleted = _others(record), list[str]()
            for name in _own_headshots(record, others):
                (Path(folder_paths.get_output_directory()) / name).unlink()
                deleted.append(f"output/{name}")
            deleted += _delete_loras(_loras(record, others), record["name"])
            if all(_job(other) != _job(record) for other in others):
                forget_run(_job(record))
            kept = {digest for other in others for digest in other["digests"]}
            forget_latents(set(record["digests"]) - kept)
            for folder in _folders(record, others, queued):
                deleted += [f"input/{name}" for name in delete_dropped(folder)]
            _file(user, key).unlink()
            return record["run"], deleted

    def rename(
        self,
        user: str | None,
        key: str,
        name: str,
        prompts: Collection[str],
        renamed: Callable[[str, str, Collection[str]], None],
    ) -> str:
        """Rename a training run of the user, its LoRAs and their sidecars, and return the new name, with their folder.

        `renamed` is called with the old and the new name, and the headshots by name below the output folder.
        Raises BadConfig as `delete` does, and for a name that is taken or that files cannot have.
        """
        with self._lock:
            record = self._at_rest(user, key, prompts)
            new, old = Path(lora_path(name)).name, _stem(record)
            full = str(PurePosixPath(record["name"]).with_name(new))  # in the same folder below that of LoRAs
            named = [path for path in _loras(record, _others(record)) if _STEP.sub("", path.stem) == old]
            targets = {path: path.with_name(new + path.name.removeprefix(old)) for path in named}
            if taken := next((target.name for target in targets.values() if target.exists()), ""):
                raise BadConfig(f"{taken}: another LoRA has this name. Choose another one")
            for path, target in targets.items():
                file = SafetensorsFile.open(path)
                copy_with_metadata(file, target, {**file.metadata, "ss_output_name": new})
                del file  # Windows can't delete a file that is still open
                for beside in filter(Path.is_file, map(path.with_suffix, SIDECARS)):
                    beside.rename(target.with_name(target.stem + beside.name.removeprefix(path.stem)))
                write_embedding(target)
                _delete_loras([path], old)
            graph = record.get("graph")
            for node in _nodes(graph or {}):
                is_own = str(node.get("id")) == record["run"]["node"].rpartition(":")[2]
                if is_own and node.get("type") == "FaceLoRATrain" and node.get("widgets_values"):
                    node["widgets_values"][0] = full
            renamed(old, new, record["headshots"])
            self.note(
                user, key, name=full, graph=graph, **({"file": f"{new}.safetensors"} if record.get("file") else {})
            )
            return full

    def delete_photos(self, user: str | None, names: Collection[str], queued: Collection[str]) -> list[str]:
        """Delete dropped photos of the user, by name below the input folder. Return what was deleted.

        Photos of a training run are kept, and `queued` photos and folders.
        """
        with self._lock:
            used = {photo for record in _all() for photo in record["photos"]} | {*queued}
            folders: dict[str, set[str]] = {}
            for folder, _, name in (name.rpartition("/") for name in names if name not in used):
                if folder not in queued:
                    folders.setdefault(folder, set()).add(name)
            own = folders.keys() & set(folders_of(user)) if user is not None else ()
            return [f"input/{name}" for folder in sorted(own) for name in delete_dropped(folder, folders[folder])]

    def _at_rest(self, user: str | None, key: str, prompts: Collection[str]) -> Record:
        """Return a record of the user. Raises BadConfig if there is none, or if its prompt is one of the running `prompts`."""
        record = _record_of(user, key)
        if not record:
            raise BadConfig("you have no such training run. Reload the list")
        if key in self._live:
            raise BadConfig(f"{record['name']} is being trained. Cancel the training run first")
        if record["run"]["prompt"] in prompts:
            raise BadConfig(f"{record['name']}: headshots are being drawn. Cancel the run first, or wait until it ends")
        return record


def _untrained(user: str, records: Collection[Record]) -> list[Record]:
    """Return what the list shows of the user's folders of dropped photos that no record has."""
    used = {photo.rpartition("/")[0] for record in records for photo in record["photos"]}
    shown = []
    for folder in (folder for folder in folders_of(user) if folder not in used):
        names = [f"{folder}/{name}" for name in photos_in(folder)]
        names = [name for name in names if not name.endswith(MASK_ENDING)] or names
        name = folder.rpartition("/")[2]
        shown.append({"key": None, "name": name, "phase": UNTRAINED, "can_open": False, "files": names})
    return shown


def digest_of(name: str) -> str:
    """Return the digest of a picture by its name below the output folder; "" for a file that is missing or elsewhere."""
    root = Path(folder_paths.get_output_directory()).resolve()
    path = (root / name).resolve()
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_relative_to(root) and path.is_file() else ""


def _nodes(graph: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the nodes of a page's graph and of its subgraphs."""
    subgraphs = graph.get("definitions", {}).get("subgraphs", ())
    return [node for one in (graph, *subgraphs) for node in one.get("nodes", ())]


def _others(record: Record) -> list[Record]:
    return [other for other in _all() if (other["user"], other["key"]) != (record["user"], record["key"])]


def _job(record: Record) -> str:
    return record.get("job", record["key"])


def _headshots(record: Record) -> list[str]:
    """Return the record's headshots that still exist. ComfyUI gives the name of a deleted picture to another one."""
    return [name for name, digest in record["headshots"].items() if digest and digest_of(name) == digest]


def _own_headshots(record: Record, others: Collection[Record]) -> list[str]:
    """Return those that no other record has: Save Headshots saves the same picture of two training runs once."""
    digests = record["headshots"]
    return [name for name in _headshots(record) if all(one["headshots"].get(name) != digests[name] for one in others)]


def _folders(record: Record, others: Collection[Record], queued: Collection[str]) -> list[str]:
    """Return the folders of photos that were dropped for the record, except those that others have or that are queued."""
    used, root = [*queued, *(photo for other in others for photo in other["photos"])], own_root(record["user"])
    folders = sorted({name.rpartition("/")[0] for name in record["photos"]})
    own = [folder for folder in folders if folder.rpartition("/")[0] == root]
    return [folder for folder in own if not any(f"{name}/".startswith(f"{folder}/") for name in used)]


def _loras(record: Record, others: Collection[Record]) -> list[Path]:
    """Return the LoRAs of the record in the folders of LoRAs and of Save Face LoRA, without those of other records."""
    rivals = [other for other in others if _job(other) == _job(record)]
    folders = [*folder_paths.get_folder_paths("loras"), Path(folder_paths.get_output_directory()) / "loras"]
    files, own = files_of(_job(record), [Path(folder) for folder in folders]), _stem(record)
    if any(_stem(other) == own for other in rivals):  # of another user
        return []
    return [path for path in files if not rivals or _STEP.sub("", path.stem) == own]


def _stem(record: Record) -> str:
    """Return the name of the record's LoRA, which has a number if another one has the name of the person."""
    return _STEP.sub("", Path(record.get("file") or f"{record['name']}.safetensors").stem)


def _delete_loras(paths: Sequence[Path], name: str) -> list[str]:
    """Delete LoRAs, with their sidecars and embeddings.

    Files that are found through another one are deleted before it, so that a second attempt finds what is left of them.
    """
    with suppress(InUse), locked(Path(folder_paths.get_folder_paths("loras")[0]) / f"{name}.safetensors"):
        pass  # this deletes the lock file that a killed server left
    words = Path(folder_paths.get_folder_paths("embeddings")[0])
    deleted = []
    for path in reversed(paths):
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


def _record_of(user: str | None, key: str) -> Record:
    return {} if user is None else _record_in(_file(user, key))


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
