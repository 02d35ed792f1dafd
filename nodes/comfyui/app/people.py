"""The people whom each user has trained: a record of every training run and name, until its user deletes it with its files.

A training run that is repeated under another name makes a copy of its LoRA, which has a record of its own.
"""

# pyright: reportMissingImports=false

import hashlib
import io
import json
import os
import re
import secrets
import threading
import time
import zipfile
from collections.abc import Callable, Collection, Mapping
from contextlib import ExitStack, suppress
from pathlib import Path, PurePosixPath
from typing import Any

import folder_paths
from comfy.cli_args import args
from PIL import Image

from ....core.errors import BadConfig, BadFile, FaceLoraError, InUse
from ....core.lora.embeddings import embedding_files
from ....core.lora.file import LoraFile
from ....core.lora.sidecars import sidecars_of, taken_by
from ....core.photos.agreement import PERSON_FILE, agreement_file, read_person_file, write_agreement
from ....core.photos.reading import DAMAGED, MASK_ENDING
from ....core.storage.cache_folder import cache_folder, content_key, made_folder
from ....core.storage.drawn import DRAWN, jpeg_url
from ....core.storage.files import read_json, write_text
from ....core.storage.locks import locked
from ....core.storage.safetensors_file import SafetensorsFile, copy_with_metadata
from ....core.training.encode import forget_latents
from ....core.training.job import TRAINING_VERSION
from ....core.training.store import lora_path
from ....core.training.trained_file import RunFolder, files_of, forget_run, with_tensors, without_step
from ...shown import DONE, STOPPED
from ..folders import embedding_name, write_embedding
from .dropped import delete_dropped, folders_of, own_root, photos_in, stem_of

Record = dict[str, Any]
PICTURE_SIDE = 256
"""The longer side of a person's picture in the list, in pixels."""
RUNNING = "running"
DRAWING = "drawing"
"""The phase of a finished training run whose prompt still runs, for example to draw headshots."""
UNTRAINED = "untrained"
"""The phase of dropped photos that no training run has."""
RESTORED, TRAINED, OUTDATED = "restored", "trained", "outdated"
"""What the next run does about a LoRA that was deleted or moved: it is copied from a kept file, or trained again.

One that an older version has trained in another way is OUTDATED, and trained again too.
"""
CONSENT = ("agreed_by", "agreed_for", "agreed_until", "withdrawn")
"""The fields of a note of consent that the list asks for."""
PUBLIC = ("key", "name", "begun", "file", "likeness", "likeness_word")
"""The fields of a record that the list shows."""


class People:
    """The records of all users' training runs, kept in the cache folder. A record is for its user alone: others find none."""

    def __init__(self) -> None:
        self._live: set[str] = set()  # the keys of the records whose training runs are in this process
        self._lock = threading.RLock()

    def key_of(self, user: str | None, job: str, name: str) -> str:
        """Return the key of the user's record of a training run, by its job's key, under a name."""
        records = [one for one in map(self._settled, _all()) if one["user"] == user and _job(one) == job]
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
            with suppress(BadFile):  # Training continues on a full disk.
                self._write(user, key, facts)

    def _write(self, user: str, key: str, facts: Record) -> None:
        made_folder("panels")
        before = {"user": user, "key": key, "begun": time.time(), "headshots": {}} | _record_in(_file(user, key))
        write_text(_file(user, key), json.dumps(before | facts))

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
        facts: Record = {"headshots": record["headshots"] | dict(digests), "styles": record.get("styles", {}) | styled}
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
        everyone = list(map(self._settled, _all()))
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
            others["lost"] = _lost(record)
            shown.append({name: record.get(name) for name in PUBLIC} | counts | others)
        return shown + ([] if user is None else _untrained(user, everyone))

    def lost(self, user: str | None, key: str) -> str | None:
        """Return what the next run does about a finished LoRA of the user that it can't use: RESTORED, TRAINED or OUTDATED."""
        return _lost(_record_of(user, key))

    def graph_of(self, user: str | None, key: str) -> Any:
        """Return the page's graph that a training run of the user was queued with; None if there is none."""
        return _record_of(user, key).get("graph")

    def styles_of(self, user: str | None, key: str) -> list[dict[str, str]]:
        """Return the headshot of each style with the highest likeness: its pack, style, and name below the output folder."""
        record, best = _record_of(user, key), dict[tuple[str, str], tuple[float, str]]()
        for name in _headshots(record) if record.get("styles") else ():
            match record["styles"].get(name):
                case [str(pack), str(style), int() | float() as likeness]:
                    best[pack, style] = max(best.get((pack, style), (-1.0, "")), (likeness, name))
        return [{"pack": pack, "style": style, "name": name} for (pack, style), (_, name) in best.items() if name]

    def headshots_zip(self, user: str | None, key: str) -> tuple[str, io.BytesIO]:
        """Return the name of a training run of the user, and a ZIP file of its headshots."""
        record, data = _record_of(user, key), io.BytesIO()
        names = _headshots(record) if record else []
        folders = {name.rpartition("/")[0] for name in names}
        with zipfile.ZipFile(data, "w", strict_timestamps=False) as archive:  # A ZIP file knows no time before 1980.
            for name in names:  # ComfyUI numbers the pictures of each folder from 1
                with suppress(OSError):  # deleted meanwhile
                    file = Path(folder_paths.get_output_directory()) / name
                    shown = file.name if len(folders) == 1 else name
                    archive.write(file, re.sub(r'[<>:"|?*\\\ud800-\udfff]', "_", shown))  # Windows can't have these.
        data.seek(0)
        return _stem(record) if record else "headshots", data

    def consent(self, user: str | None, key: str, written: Mapping[str, Any]) -> Record:
        """Return the note of consent of a training run of the user, by CONSENT's names.

        `written` is set in it first, and in that of the photos, so that no other LoRA of them is trained after a withdrawal.
        Raises BadConfig if the user has no such training run, if it runs, or if a note wouldn't be valid.
        """
        record = self._at_rest(user, key, ())
        file = agreement_file(_output(record))
        if unknown := written.keys() - set(CONSENT):
            raise BadConfig(f"{min(unknown)}: unknown; choose from {', '.join(CONSENT)}")
        before, _ = read_person_file(file)
        known = {name: value for name in ("agreed_on", *CONSENT) if (value := getattr(before, name))}
        for one in {file, *_photo_notes(record)} if written else ():
            write_agreement(one, {**known, **written})
        agreement, _ = read_person_file(file)
        return {name: str(getattr(agreement, name) or "") for name in CONSENT}

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
            loras = _loras(record, others)
            beside = [file for path in loras for file in sidecars_of(path)]
            gone = [*beside, *_embeddings(loras, _files_of(record)), *loras]
            for name in _own_headshots(record, others):
                (Path(folder_paths.get_output_directory()) / name).unlink(missing_ok=True)
                deleted.append(f"output/{name}")
            with suppress(InUse), locked(_output(record)):
                pass  # this deletes the lock file that a killed server left
            for file in gone:
                file.unlink()
                deleted.append(file.name)
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
        Raises BadConfig as `delete` does, and for a name that is taken or that files cannot have. InUse means that a training
        run is about to write a LoRA of this name. Nothing has changed then. `_settled` ends it if the server is killed.
        """
        with self._lock:
            record = self._at_rest(user, key, prompts)
            new, old = Path(lora_path(name)).name, _stem(record)
            if without_step(Path(f"{new}.safetensors")) != new:
                raise BadConfig(f"name {new!r}: intermediate LoRAs have such names. Leave out -step and the number")
            moves = _moves(record, new)
            for path in moves:
                LoraFile.read(path)  # raises for a damaged file
            targets = [*moves.values(), _output(record).with_name(f"{new}.safetensors")]
            if taken := next(filter(None, map(taken_by, targets)), None):
                raise BadConfig(f"{taken.name}: another LoRA has this name. Choose another one")
            full = str(PurePosixPath(record["name"]).with_name(new))  # in the same folder below that of LoRAs
            renaming = {str(path): str(target) for path, target in moves.items()}
            with ExitStack() as held:
                for folder in {path.parent for path in moves}:
                    held.enter_context(locked(folder / f"{new}.safetensors"))
                self._write(record["user"], key, {"renaming": renaming})
                try:
                    for path, target in moves.items():
                        file = SafetensorsFile.open(path)
                        copy_with_metadata(file, target, {**file.metadata, "ss_output_name": new})
                        del file  # Windows can't delete a file that is still open
                        write_embedding(target)
                    facts = {"file": f"{new}.safetensors"} if record.get("file") else {}
                    self._write(record["user"], key, facts | {"name": full, "graph": _renamed_in(record, full)})
                finally:
                    self._settled(_record_of(user, key))
            renamed(old, new, record["headshots"])
            return full

    def _settled(self, record: Record) -> Record:
        """Return the record after a rename is ended, if one is noted in it: also one during which the server was killed."""
        if not record.get("renaming"):
            return record
        with self._lock, suppress(BadFile, OSError):
            if (record := _record_of(record["user"], record["key"])).get("renaming"):
                self._end_rename(record)
        return _record_of(record["user"], record["key"])

    def _end_rename(self, record: Record) -> None:
        """Delete the LoRAs under their old names if the record has its new name, else those under the new names."""
        made = _files_of(record)
        moves = [(Path(source), Path(target)) for source, target in record["renaming"].items()]
        is_renamed = all(without_step(target) == _stem(record) for _, target in moves)
        gone = [one for one in (source if is_renamed else target for source, target in moves) if one in made]
        for source, target in moves if is_renamed else ():
            for beside in sidecars_of(source):
                beside.rename(target.with_name(target.stem + beside.name.removeprefix(source.stem)))
        for file in (*_embeddings(gone, made), *gone):
            file.unlink()
        self._write(record["user"], record["key"], {"renaming": {}})

    def delete_photos(self, user: str | None, names: Collection[str], queued: Collection[str]) -> list[str]:
        """Delete dropped photos of the user, by name below the input folder. Return what was deleted.

        Photos of a training run are kept, and `queued` photos and folders.
        """
        with self._lock:
            used = {stem_of(name) for name in (*queued, *(name for record in _all() for name in record["photos"]))}
            folders: dict[str, set[str]] = {}
            for folder, _, name in (name.rpartition("/") for name in names if stem_of(name) not in used):
                if not any(f"{folder}/".startswith(f"{one}/") for one in queued):
                    folders.setdefault(folder, set()).add(name)
            own = folders.keys() & set(folders_of(user)) if user is not None else ()
            return [f"input/{name}" for folder in sorted(own) for name in delete_dropped(folder, folders[folder])]

    def _at_rest(self, user: str | None, key: str, prompts: Collection[str]) -> Record:
        """Return a record of the user. Raises BadConfig if there is none, or if its prompt is one of the running `prompts`."""
        record = self._settled(_record_of(user, key))
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
    with suppress(ValueError):  # a name that no file can have
        path = Path(os.path.realpath(root / name))
        if path.is_relative_to(root) and os.path.isfile(path):
            return hashlib.sha256(path.read_bytes()).hexdigest()
    return ""


def _renamed_in(record: Record, name: str) -> Any:
    """Return the graph of a record with that name in the node that trained."""
    graph = record.get("graph")
    for node in _nodes(graph):
        match node:
            case {"id": number, "type": "FaceLoRATrain", "widgets_values": list(values)}:
                if values and str(number) == record["run"]["node"].rpartition(":")[2]:
                    values[0] = name
    return graph


def _nodes(graph: object) -> list[Any]:
    """Return the nodes of a page's graph and of its subgraphs."""
    graphs = [graph]
    match graph:
        case {"definitions": {"subgraphs": list(subgraphs)}}:
            graphs += subgraphs
    lists = [one["nodes"] for one in graphs if isinstance(one, dict) and isinstance(one.get("nodes"), list)]
    return [node for nodes in lists for node in nodes]


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


def _photo_notes(record: Record) -> set[Path]:
    """Return the notes in the folders of the record's photos; with --multi-user, only of those that were dropped."""
    root, folders = Path(folder_paths.get_input_directory()), {name.rpartition("/")[0] for name in record["photos"]}
    own = [one for one in folders - {""} if not args.multi_user or one.rpartition("/")[0] == own_root(record["user"])]
    return {root / folder / PERSON_FILE for folder in own if os.path.isdir(root / folder)}


def _folders(record: Record, others: Collection[Record], queued: Collection[str]) -> list[str]:
    """Return the folders of photos that were dropped for the record, except those that others have or that are queued."""
    used, root = [*queued, *(photo for other in others for photo in other["photos"])], own_root(record["user"])
    folders = sorted({name.rpartition("/")[0] for name in record["photos"]})
    own = [folder for folder in folders if folder.rpartition("/")[0] == root]
    kept = [f"{name}/" for name in used]
    return [one for one in own if not any(f"{one}/".startswith(name) or name.startswith(f"{one}/") for name in kept)]


def _lost(record: Record) -> str | None:
    if record.get("phase") != DONE or not record.get("file"):
        return None
    if os.path.lexists(_output(record)):
        return None if record.get("training") == TRAINING_VERSION else OUTDATED
    run = RunFolder.of(_job(record))
    folders = list(map(Path, folder_paths.get_folder_paths("loras")))
    return RESTORED if run.files.output.exists() or with_tensors(run.made(), folders) else TRAINED


def _loras(record: Record, others: Collection[Record]) -> list[Path]:
    """Return the LoRAs of the record in the folders of LoRAs and of Save Face LoRA, without those of other records."""
    rivals = [other for other in others if _job(other) == _job(record)]
    own = _stem(record)
    if any(_stem(other) == own for other in rivals):  # of another user
        return []
    return [path for path in _files_of(record) if not rivals or without_step(path) == own]


def _files_of(record: Record) -> list[Path]:
    """Return all LoRAs of the record's job. Records of other names may have some of them."""
    folders = [*folder_paths.get_folder_paths("loras"), Path(folder_paths.get_output_directory()) / "loras"]
    output = _output(record) if record.get("file") else None
    return files_of(_job(record), output, list(map(Path, folders)))


def _moves(record: Record, new: str) -> dict[Path, Path]:
    """Return where each LoRA with the name of the record is moved to when it gets a new name."""
    old, paths = _stem(record), _loras(record, _others(record))
    return {path: path.with_name(new + path.name.removeprefix(old)) for path in paths if without_step(path) == old}


def _output(record: Record) -> Path:
    """Return the path that Train Face LoRA gave to the record's LoRA, or would give to it."""
    name = PurePosixPath(record["name"]).with_name(f"{_stem(record)}.safetensors")
    return Path(folder_paths.get_folder_paths("loras")[0]) / name


def _stem(record: Record) -> str:
    """Return the name of the record's LoRA, which has a number if another one has the name of the person."""
    return without_step(Path(record.get("file") or f"{record['name']}.safetensors"))


def _embeddings(gone: Collection[Path], made: Collection[Path]) -> list[Path]:
    """Return the files of the embeddings of some of a job's LoRAs that no other has. Those of damaged ones are unknown."""
    words = Path(folder_paths.get_folder_paths("embeddings")[0])
    names: dict[bool, set[str]] = {True: set(), False: set()}
    for path in made:
        with suppress(FaceLoraError):
            lora = LoraFile.read(path)
            names[path in gone] |= {embedding_name(lora, embedding) for embedding in embedding_files(lora).values()}
    return list(filter(Path.is_file, (words / f"{name}.safetensors" for name in sorted(names[True] - names[False]))))


def _file(user: str | None, key: str) -> Path:
    return cache_folder() / "panels" / f"{content_key('person', user, key)}.json"


def _record_of(user: str | None, key: str) -> Record:
    return {} if user is None else _record_in(_file(user, key))


def _record_in(file: Path) -> Record:
    with suppress(BadFile):
        match read_json(file):
            case {"user": str(), "key": str(), "name": str(name), "begun": int() | float(), "photos": list(photos),
                  "digests": list(digests), "headshots": dict(headshots),
                  "run": {"prompt": str(), "workflow": _, "node": str()}} as record:  # fmt: skip
                texts = *photos, *digests, *headshots.values(), record.get("file") or ""
                tables = [record.get(field, {}) for field in ("styles", "renaming")]
                fits = all(isinstance(one, str) for one in texts) and all(isinstance(one, dict) for one in tables)
                if fits and PurePosixPath(name).name:
                    return record
    return {}


def _all() -> list[Record]:
    """Return the records of all users. Other files in the folder are ignored."""
    files = (cache_folder() / "panels").glob("*.json")
    return [record for record in map(_record_in, files) if record]
