"""The people of the page: their photos and jobs in folders of its own, their LoRAs and headshots in the output of a studio.

FOLDER is the output of `facelora studio`, and FOLDER/.page/NAME is what the page keeps of a person. The photos of the next
person are in FOLDER/.page/.next until it has a name.
"""

import json
import os
import re
import shutil
import tempfile
import threading
import zipfile
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from itertools import count
from pathlib import Path
from typing import Any, BinaryIO

from ...core.config import RecipeName
from ...core.errors import BadConfig, BadFile, BadPhoto, check_length
from ...core.faces import faces_if_installed
from ...core.lora.file import LoraFile
from ...core.lora.sidecars import sidecars_of, taken_by, write_sidecars
from ...core.photos import Photo, Thresholds, check_photos, count_photos, person_file, read_photos, write_agreement
from ...core.photos.agreement import NOTE, PERSON_FILE
from ...core.photos.reading import MAX_BYTES, PHOTO_SUFFIXES, read_photo_files
from ...core.pictures.headshots import OVERVIEW
from ...core.pictures.style_pack import check_count
from ...core.storage.files import check_deleted, delete, make_folder, read_json, write_file, write_text, writing
from ...core.storage.plain_values import read_as
from ...core.storage.safetensors_file import SafetensorsFile, copy_with_metadata
from ...core.studio.forgetting import forget
from ...core.studio.people import problem_of_name
from ...core.studio.report import read_report, write_report
from ...core.studio.result import CACHE, RECORD
from ..shown import shown_check
from .jobs import DRAW, TRAIN, Jobs

OWN, NEXT = ".page", ".next"
"""The page's folder, and in it that of the next person."""
MOST_PHOTOS = 200
"""How many photos a person may have."""
MOST_ALIKE = 4
"""How many pictures like one are drawn."""


@dataclass(frozen=True)
class Request:
    """What is asked for to train a person and draw headshots."""

    name: str
    base: str
    agreed: bool
    class_word: str = "person"
    recipe: RecipeName = "balanced"
    style_pack: str = ""
    """The style pack; empty for the base model's usual one."""
    count: int = 20
    steps: int = 0
    """The number of steps; 0 for that of the recipe."""
    agreed_by: str = ""
    """Who has agreed. This and the next two are only kept in the note of consent, among the photos."""
    agreed_for: str = ""
    agreed_until: str = ""

    def arguments(self, photos: Path, manifest: Path, output: Path) -> list[str]:
        """Return the command, whose list of people is written to `manifest`."""
        person = {"name": self.name, "photos": str(photos), "agreed": self.agreed, "class_word": self.class_word}
        write_text(manifest, json.dumps(person) + "\n")
        numbers = {"--count": self.count, "--steps": self.steps}
        given = [f"{option}={number}" for option, number in numbers.items() if number]
        pack = [f"--style-pack={self.style_pack}"] if self.style_pack else []
        return [
            "studio", str(manifest), f"--base={self.base}", f"--output={output}", f"--recipe={self.recipe}",
            "--json", *given, *pack,
        ]  # fmt: skip


class Home:
    """Everyone in the page's folder."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.own = make_folder(folder).resolve(), make_folder(folder / OWN).resolve()
        self.own.chmod(0o700)
        self.jobs = Jobs(self.own)
        self._checked: tuple[Any, dict[str, Any]] = None, {}
        self._copying = threading.Lock()

    def names(self) -> list[str]:
        """Return the names of all people, the latest first."""
        asked = {path.name: job.asked for path in self.own.iterdir() if (job := self.jobs.of(path, TRAIN))}
        return sorted(asked, key=lambda name: -asked[name])

    def place(self, name: str) -> Path:
        """Return the page's folder of a person. Raises BadConfig if nobody has that name."""
        place = self.own / name
        if name not in os.listdir(self.own) or self.jobs.of(place, TRAIN) is None:
            raise BadConfig(f"{name}: nobody has this name. Reload the page")
        return place

    # The photos of the next person.

    def photos_of(self, name: str | None) -> Path:
        """Return the folder of a person's photos; for None, of those of the next person."""
        return (self.own / NEXT if name is None else self.place(name)) / "photos"

    def photo_names(self, name: str | None = None) -> list[str]:
        folder = self.photos_of(name)
        files = folder.iterdir() if folder.is_dir() else ()
        return sorted(path.name for path in files if path.is_file() and path.name != PERSON_FILE)

    async def add_photo(self, file_name: str, pieces: AsyncIterator[bytes]) -> str:
        """Write a photo of the next person, and return its name. Raises BadPhoto for another file, or one that is too large."""
        stem, ending = os.path.splitext(file_name)
        if ending.lower() not in PHOTO_SUFFIXES:
            raise BadPhoto(f"{file_name}: not a photo. Use jpg, png, webp, heic or another image format")
        if len(self.photo_names()) >= MOST_PHOTOS:
            raise BadPhoto(f"{file_name}: there are {MOST_PHOTOS} photos already. 10 to 20 are enough")
        folder = make_folder(self.photos_of(None))
        name = (re.sub(r"[^\w ()-]", "_", stem)[:60].strip() or "photo") + ending.lower()
        part = make_folder(self.own / NEXT / "part") / name
        try:
            with writing(part), part.open("wb") as file:
                await _write(file, pieces, file_name)
            read_photo_files([part], strict=True)
            content = part.read_bytes()
            for other in folder.iterdir():
                if other.stat().st_size == len(content) and other.read_bytes() == content:
                    return other.name
            names, number = set(self.photo_names()), 2
            while name.casefold() in {one.casefold() for one in names}:
                name, number = f"{part.stem}-{number}{part.suffix}", number + 1
            part.replace(folder / name)
        except BadPhoto as problem:
            raise BadPhoto(str(problem).replace(part.name, file_name)) from None
        finally:
            part.unlink(missing_ok=True)
        return name

    def photo(self, name: str, of: str | None = None) -> Photo:
        """Read a photo. Raises BadPhoto if there is none of that name."""
        if name not in self.photo_names(of):
            raise BadPhoto(f"{name}: this photo was deleted. Reload the page")
        (photo,) = read_photo_files([self.photos_of(of) / name], strict=True, on_warning=lambda _: None)
        return photo

    def delete_photo(self, name: str) -> None:
        if name in self.photo_names():
            (self.photos_of(None) / name).unlink()

    def check(self, resolution: int) -> dict[str, Any]:
        """Return what the page shows of the next person's photos, judged for that resolution in pixels."""
        folder, names = self.photos_of(None), self.photo_names()
        key = resolution, tuple((name, (folder / name).stat().st_mtime_ns) for name in names)
        if key != self._checked[0]:
            notes: list[str] = []
            photos = read_photos(folder, repeats=False, on_warning=notes.append) if names else []
            report = check_photos(photos, faces_if_installed(notes.append), Thresholds.for_resolution(resolution))
            self._checked = key, shown_check([photo.name for photo in photos], {}, notes, report if photos else None)
        return self._checked[1]

    # Their jobs.

    def begin(self, request: Request) -> None:
        """Give the next person its name, and train it. Raises BadConfig if something is missing."""
        name = request.name
        if not request.agreed:
            raise BadConfig("train only people who have agreed to it. Tick the box if this person has")
        if problem := problem_of_name(name):
            raise BadConfig(problem)
        taken = (*self.names(), *(path.name for path in self.folder.iterdir()))
        if name.casefold() in {one.casefold() for one in taken}:
            raise BadConfig(f"{name}: this name is taken. Choose another one")
        if not count_photos(self.photos_of(None)):
            raise BadConfig("add 10 to 20 photos of the person")
        for what, text in (("kind of person", request.class_word), ("style pack", request.style_pack)):
            check_length(what, text)
        check_count(request.count)
        note = {key: getattr(request, key) for key in ("agreed_by", "agreed_for", "agreed_until")}
        if any(note.values()):
            write_agreement(person_file(self.photos_of(None)), note)
        request = replace(request, agreed_by="", agreed_for="", agreed_until="")
        place = self.own / name
        with writing(place):
            (self.own / NEXT).rename(place)
        write_text(place / "request.json", json.dumps(asdict(request)))
        self.train(name)

    def train(self, name: str, *, again: bool = False) -> None:
        """Train a person, or continue."""
        place = self.place(name) if again else self.own / name
        arguments = self.request(name).arguments(place / "photos", place / "people.jsonl", self.folder)
        self.jobs.ask(place, TRAIN, arguments, again=again)

    def request(self, name: str) -> Request:
        return read_as(Request, read_json(self.own / name / "request.json"))

    def draw(self, name: str, *, like: str = "", pack: str = "", styles: Sequence[str] = (), count: int = 8) -> None:
        """Draw more headshots of a trained person: like one of them, or in styles of a pack (none: all of it)."""
        place, request, lora = self.place(name), self.request(name), self.lora(name)
        check_count(count)
        if like:
            shot = self._headshots(name).get(like)
            if shot is None:
                raise BadConfig(f"{like}: this headshot was deleted. Reload the page")
            given = {"prompt": shot["prompt"], "negative": shot["negative"], "seed": (shot["seed"] + 1) % 2**64}
            given |= {"steps": shot["steps"], "guidance": shot["guidance"], "count": MOST_ALIKE}
            given |= {"size": "x".join(map(str, shot["size"]))} if shot["size"] else {}
            output = "more-" + Path(like).with_suffix("").as_posix().replace("/", "-")
        else:
            given = {"style-pack": pack, "count": count}
            output = "styles-" + re.sub(r"[^\w-]", "_", pack)
        options = [f"--{option}={value}" for option, value in given.items() if value != "" or option == "prompt"]
        options += [f"--style={style}" for style in styles]
        arguments = ["generate", f"--base={request.base}", f"--lora={lora}", *options, "--json"]
        reference = [f"--reference={place / 'photos'}"] if faces_if_installed(lambda _: None) else []
        self.jobs.ask(place, DRAW, [*arguments, *reference, f"--output={self.folder / name / output}"])

    def stop(self, name: str) -> None:
        self.jobs.stop(self.place(name))

    # What they have.

    def shown(self, name: str, *, whole: bool = True) -> dict[str, Any]:
        """Return what the page shows of a person; if not `whole`, in the list."""
        place = self.place(name)
        state, shots = self.jobs.state(place, TRAIN), self._ranked(name)
        best = next(iter(shots), {})
        short = {
            "name": name,
            "phase": state.get("phase"),
            "picture": best.get("file"),
            "likeness": best.get("likeness"),
        }
        short |= {"active": self.jobs.is_active(place), "photos": len(self.photo_names(name))}
        if not whole:
            return short
        more = {"file": lora.name} if (lora := self._lora(name)) else {}
        samples = sorted((self.folder / name / CACHE / "runs").glob("*/sample-*.png"))
        last = [path for path in samples if path.name[:13] == samples[-1].name[:13]]
        more |= {"samples": [path.name for path in last]} if last else {}
        drawing = self.jobs.state(place, DRAW)
        request = asdict(self.request(name))
        return {**short, **state, **more, "headshots": shots, "drawing": drawing, "request": request}

    def sample(self, name: str, file: str) -> Path:
        """Return the path of a sample of a training run. Raises BadConfig if none has that name."""
        for path in (self.folder / self.place(name).name / CACHE / "runs").glob("*/sample-*.png"):
            if path.name == file:
                return path
        raise BadConfig(f"{file}: this sample was deleted. Reload the page")

    def headshot(self, name: str, file: str) -> Path:
        """Return the path of a headshot. Raises BadConfig if there is none of that name."""
        if file not in self._headshots(name):
            raise BadConfig(f"{file}: this headshot was deleted. Reload the page")
        return self.folder / name / file

    def archive(self, name: str) -> str:
        """Write the favourites into a temporary ZIP file, or all headshots if there are none, and return its path."""
        shots, favourites = self._headshots(name), self._favourites(name)
        with tempfile.NamedTemporaryFile(suffix=".zip", delete=False) as file, zipfile.ZipFile(file, "w") as archive:
            for one in favourites & shots.keys() or shots:
                archive.write(self.folder / name / one, one)
        return file.name

    def set_favourite(self, name: str, file: str, favourite: bool) -> None:
        chosen = self._favourites(name) - {file} | ({file} if favourite else set())
        self.headshot(name, file)
        write_text(self.place(name) / "favourites.json", json.dumps(sorted(chosen)))

    def lora(self, name: str) -> Path:
        """Return a person's LoRA. Raises BadConfig if there is none."""
        if (lora := self._lora(name)) is None:
            raise BadConfig(f"{name}: no LoRA has been trained yet")
        return lora

    def delete(self, name: str) -> None:
        """Delete all that is kept of a person: photos, LoRA, headshots, and what was computed from them."""
        place, left = self._at_rest(name), list[str]()
        if (self.folder / name).exists():
            forget(name, self.folder)
        check_deleted(delete(place, left), left)
        self.copy_loras(None)

    def rename(self, name: str, new: str) -> None:
        """Rename a person and the LoRA. Another training run of the person makes the headshots again."""
        place = self._at_rest(name)
        if problem := problem_of_name(new):
            raise BadConfig(problem)
        taken = {one.casefold() for one in (*self.names(), *(path.name for path in self.folder.iterdir()))}
        if new.casefold() in taken - {name.casefold()} or new == name:
            raise BadConfig(f"{new}: this name is taken. Choose another one")
        old = self.folder / name
        lora = self._lora(name)
        with writing(place):
            if lora:
                LoraFile.read(lora)  # Raises for a damaged file.
                file = SafetensorsFile.open(lora)
                copy_with_metadata(file, old / f"{new}.safetensors", {**file.metadata, "ss_output_name": new})
                del file  # Windows can't delete a file that is still open.
                if (note := person_file(lora)).exists():
                    write_text(old / f"{new}{NOTE}", note.read_text("utf-8"))
            # A killed process leaves the old name with everything, or the new one with everything but the file's old copy.
            write_text(place / "request.json", json.dumps(asdict(self.request(name)) | {"name": new}))
            if old.exists():
                old.rename(self.folder / new)
            place.rename(self.own / new)
            write_report(self.folder, [line for line in read_report(self.folder) if line.name != name])
            if lora:
                for gone in (lora, person_file(lora)):
                    (self.folder / new / gone.name).unlink(missing_ok=True)

    def copy_loras(self, folder: Path | None) -> bool:
        """Copy new LoRAs to another program's folder, with the files that it reads beside them. Return whether one changed.

        Copies of people who are gone are deleted; for None, nothing else happens. A copy that the user has deleted is not made
        again.
        """
        with self._copying:
            listed, copies = self.own / "copies.json", dict[str, list[Any]]()
            with suppress(BadFile):
                copies = dict(read_json(listed))
            loras = {name: lora for name in self.names() if (lora := self._lora(name))}
            gone = [copy for copy, (name, _) in copies.items() if name not in loras]
            for copy in gone:
                for file in (*sidecars_of(Path(copy)), Path(copy)):
                    file.unlink(missing_ok=True)
                del copies[copy]
            mine = {name: (Path(copy), made) for copy, (name, made) in copies.items() if Path(copy).parent == folder}
            new = {name: lora.stat().st_mtime_ns for name, lora in loras.items()} if folder else {}
            changed = [name for name, made in new.items() if mine.get(name, (None, 0))[1] != made]
            for name in changed:
                assert folder
                free = (f"{name}{f'-{number}' if number > 1 else ''}.safetensors" for number in count(1))
                copy = (
                    mine[name][0] if name in mine else next(folder / one for one in free if not taken_by(folder / one))
                )
                copies[str(copy)] = [name, 0]  # After a crash, the copy is known to be ours, and made again.
                write_text(listed, json.dumps(copies))
                with loras[name].open("rb") as file:
                    write_file(copy, lambda out, file=file: shutil.copyfileobj(file, out))
                copies[str(copy)] = [name, new[name]]
                write_sidecars(copy, *(self.folder / name / shot["file"] for shot in self._ranked(name)[:1]))
            if gone or changed:
                write_text(listed, json.dumps(copies))
            return bool(gone or changed)

    def published(self, name: str, title: str) -> tuple[list[str], Path]:
        """Return the command that makes a folder to upload, with the favourites or the kept headshots, and the folder."""
        chosen = self._favourites(name) or {one["file"] for one in self._ranked(name) if one["kept"]}
        if not chosen:
            raise BadConfig("mark the headshots to publish with a star")
        check_length("title", title)
        folder = self.folder / name
        output = next(path for number in count(1) if not (path := folder / f"published-{number}").exists())
        pictures = [str(self.headshot(name, file)) for file in sorted(chosen)]
        given = ["--agreed", f"--title={title}", f"--output={output}", "--pictures", *pictures]
        return ["publish", str(self.lora(name)), *given], output

    def _at_rest(self, name: str) -> Path:
        place = self.place(name)
        if self.jobs.is_active(place):
            raise BadConfig(f"{name}: this is running. Cancel it first")
        return place

    def _lora(self, name: str) -> Path | None:
        path = self.folder / name / f"{self.request(name).name}.safetensors"
        return path if path.is_file() and (path.parent / RECORD).exists() else None

    def _headshots(self, name: str) -> Mapping[str, dict[str, Any]]:
        """Return what is known of each headshot, by its name below the person's folder."""
        folder, found = self.folder / self.place(name).name, dict[str, dict[str, Any]]()
        for overview in (folder / OVERVIEW, *sorted(folder.glob(f"*/{OVERVIEW}"))):
            with suppress(BadFile, KeyError, TypeError, ValueError):
                for shot in read_json(overview)["headshots"]:
                    path = overview.parent / Path(shot["file"]).name
                    if path.is_file():
                        found[path.relative_to(folder).as_posix()] = shot
        return found

    def _ranked(self, name: str) -> list[dict[str, Any]]:
        """Return what the page shows of the headshots, most alike first."""
        shots, favourites = self._headshots(name), self._favourites(name)
        compared = any(shot["likeness"] is not None for shot in shots.values())
        shown = [
            {"file": file, "favourite": file in favourites, "likeness": _likeness(shot["likeness"], compared)}
            | {key: shot.get(key) for key in ("kept", "style", "seed")}
            for file, shot in shots.items()
        ]
        return sorted(shown, key=lambda one: -2.0 if one["likeness"] is None else one["likeness"], reverse=True)

    def _favourites(self, name: str) -> set[str]:
        with suppress(BadFile, TypeError):
            return set(map(str, read_json(self.place(name) / "favourites.json")))
        return set()


def _likeness(found: float | None, compared: bool) -> float | None:
    """Return the likeness that a page shows: -1 for a picture without a face, None if nothing was compared."""
    return max(found, 0.0) if found is not None else -1.0 if compared else None


async def _write(file: BinaryIO, pieces: AsyncIterator[bytes], name: str) -> None:
    size = 0
    async for piece in pieces:
        size += len(piece)
        if size > MAX_BYTES:
            raise BadPhoto(f"{name}: the file is larger than {MAX_BYTES >> 20} MiB")
        file.write(piece)
