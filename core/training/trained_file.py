"""Trained files, and the folders of the runs that made them."""

import itertools
import json
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from ..errors import BadConfig, BadFile, FaceLoraError
from ..lora.file import KEY, LoraFile
from ..photos.reading import DAMAGED
from ..pictures.sheet import contact_sheet
from ..storage.cache_folder import cache_folder
from ..storage.drawn import save_png
from ..storage.files import read_json, write_text
from ..storage.safetensors_file import SafetensorsFile, copy_with_metadata
from .likeness import LIKENESS_KEY
from .methods.method import Trained
from .run_files import RunFiles, metadata_of

MODEL_HASH = "sshs_model_hash"
"""The key of the tensors' hash in a saved LoRA's metadata."""
Curve = list[tuple[int, float]]
"""A list of (step, value), in the order of the steps."""


@dataclass
class RunFolder:
    """A run's folder in the cache: loss history, samples and, until the run ends, its files. A missing one reads as empty."""

    path: Path
    _history: Curve = field(default_factory=list)

    def __post_init__(self) -> None:
        # It may be missing or damaged, which doesn't matter: it is only displayed.
        with suppress(BadFile, TypeError, ValueError, OverflowError):
            self._history = [(int(step), float(loss)) for step, loss in read_json(self.path / "history.json")]

    @classmethod
    def of(cls, key: str) -> "RunFolder":
        """Return the folder of the run of a job, by its key."""
        return cls(cache_folder() / "runs" / key)

    @property
    def files(self) -> RunFiles:
        """The files of the run while it is unfinished: its LoRA, its intermediate LoRAs and its state."""
        return RunFiles(self.path / "lora.safetensors")

    def history(self) -> Curve:
        """Return the history of the smoothed loss."""
        return list(self._history)

    def add(self, step: int, loss: float) -> None:
        """Add a step to the history, and drop this and later steps that a killed process had recorded."""
        while self._history and self._history[-1][0] >= step:
            self._history.pop()
        self._history.append((step, loss))

    def save_history(self) -> None:
        """Write the history into the folder, where RunFolder reads it."""
        write_text(self.path / "history.json", json.dumps(self._history))

    def made(self) -> str | None:
        """Return the hash of the tensors of the LoRA that the run made, or None if it is unfinished."""
        file = self.path / "made.txt"
        return file.read_text("utf-8", errors="replace") if file.exists() else None

    def set_made(self, lora: LoraFile) -> None:
        """Record the hash of the LoRA that the run made, from its metadata. A file rewritten by a tool may lack it."""
        write_text(self.path / "made.txt", lora.metadata.get(MODEL_HASH, ""))

    def add_samples(self, step: int, images: Sequence[Image.Image]) -> None:
        """Write the samples of a step into the folder, replacing earlier ones."""
        for index, image in enumerate(images):
            save_png(self.path / f"sample-{step:06d}-{index}.png", image)

    def samples(self) -> dict[int, list[Image.Image]]:
        """Read the samples of each step, by step, in order."""
        found: dict[int, list[Image.Image]] = {}
        for file in sorted(self.path.glob("sample-*.png")):
            with suppress(*DAMAGED), Image.open(file) as image:
                found.setdefault(int(file.stem.split("-")[1]), []).append(image.convert("RGB"))
        return found

    def samples_until(self, step: int) -> tuple[int, list[Image.Image]] | None:
        """Read the samples that were drawn last up to this step, with their step. None if there aren't any."""
        drawn = [(at, images) for at, images in self.samples().items() if at <= step]
        return max(drawn, default=None, key=itemgetter(0))

    def add_measured(self, step: int, lora: Trained, dtype: torch.dtype) -> None:
        """Write a measured intermediate LoRA that is not the run's result into the folder."""
        lora.save(self.path / f"measured-{step:06d}.safetensors", dtype)

    def measured(self) -> dict[int, Path]:
        """Find the files that `add_measured` wrote, by step."""
        return {int(file.stem.split("-")[1]): file for file in self.path.glob("measured-*.safetensors")}

    def sample_sheet(self) -> Image.Image:
        """Draw a sheet with a row of samples for each step. Without samples, it contains a sentence that says so."""
        rows = [(f"step {step}", images) for step, images in self.samples().items()]
        return contact_sheet(rows, tile=256, title="" if rows else "no samples were drawn")


@dataclass(frozen=True)
class TrainedFile:
    """A trained LoRA, or what another method makes, and the folder of the run that made it."""

    path: Path
    run: RunFolder
    found: bool
    """Whether it had been trained before, so that no step was needed now."""

    def likenesses(self) -> Curve:
        """Return the likeness measured during its training, empty if it wasn't measured."""
        return [(point["step"], point["likeness"]) for point in self._curve()["points"]]

    def kept_step(self) -> int:
        """The step that the file is of."""
        kept = self._kept()
        return kept["step"] if kept else int(LoraFile.read(self.path).metadata.get("ss_steps", 0))

    def kept_samples(self) -> tuple[int, list[Image.Image]] | None:
        """The step and the samples that were drawn with the file, else last before its step; None where there are none."""
        return self.run.samples_until(self.kept_step())

    def leakage(self) -> float | None:
        """Return how much the class came to look like the person during training, or None if it wasn't measured."""
        kept = self._kept()
        return kept["leakage"] if kept else None

    def checkpoints(self) -> dict[int, Path]:
        """Return the files of the measured intermediate LoRAs, by step, with this one. Empty if none was measured."""
        kept = self._kept()
        return dict(sorted({**self.run.measured(), kept["step"]: self.path}.items())) if kept else {}

    def take_checkpoint(self, step: int) -> Path:
        """Return the path of a measured step's LoRA: NAME-stepNNNNNN beside this one. It is written if it doesn't exist yet.

        A different file of that name is kept, and -2 and so on is added. Raises BadConfig for a step not in `checkpoints`.
        """
        files = self.checkpoints()
        if step not in files:
            there = ", ".join(map(str, files)) or "none"
            raise BadConfig(
                f"checkpoint = {step}: {self.path.stem} has no intermediate LoRA of this step. Choose one of: {there}"
            )
        if files[step] == self.path:
            return self.path
        file, key = SafetensorsFile.open(files[step]), f"{self.run.path.name}-step{step:06d}"
        first = RunFiles(self.path).at_step(step)
        numbered = (first.with_stem(f"{first.stem}-{number}") for number in itertools.count(2))
        made = file.metadata[MODEL_HASH]
        path = next(p for p in itertools.chain([first], numbered) if not p.exists() or has_tensors(p, made))
        if not path.exists():
            copy_with_metadata(file, path, file.metadata | {KEY: key, "ss_output_name": path.stem})
        return path

    def _kept(self) -> dict[str, Any] | None:
        """Return the measurement of this file, or None if it wasn't measured."""
        curve = self._curve()
        return curve["points"][curve["kept"]] if curve["points"] else None

    def _curve(self) -> dict[str, Any]:
        """Read the measurements from its metadata. Without any, the list of points is empty."""
        return json.loads(LoraFile.read(self.path).metadata.get(LIKENESS_KEY, '{"points": []}'))


def drawn_sample(lora: LoraFile) -> Image.Image | None:
    """Return the sample drawn with the LoRA during training, or else the last one before its step. None if it was deleted."""
    match = re.fullmatch(r"([0-9a-f]{64})(-step\d+)?", lora.metadata.get(KEY, ""))
    drawn = RunFolder.of(match[1]).samples_until(int(lora.metadata.get("ss_steps", 0))) if match else None
    return drawn[1][0] if drawn else None


def has_key(path: Path, key: str, makes: str = "lora") -> bool:
    """Return whether the path has a file with the key of a job (`TrainingJob.key`) in its metadata. `Method.makes` is its type.

    The tensors of a LoRA or an embedding must match the hash in the metadata, if there is one. They must also have one dtype,
    as they were written, because the hash covers only their bytes. A checkpoint has no hash.
    """
    if makes == "checkpoint":
        return metadata_of(path).get(KEY) == key
    try:
        lora = LoraFile.read(path)
        lora.check()
        if lora.metadata.get(KEY) != key or len({tensor.dtype for tensor in lora.tensors.values()}) > 1:
            return False
        # A tool that rewrote the file may have left out the hash.
        return lora.metadata.get(MODEL_HASH, lora.model_hash) == lora.model_hash
    except FaceLoraError:
        return False


def files_of(key: str, output: Path | None, folders: Sequence[Path]) -> list[Path]:
    """Return the files that a job has made in and below the folders: its LoRA and intermediate LoRAs, by their keys.

    A damaged file, which has no key, is the job's if it has the name of `output` or of its intermediate LoRAs. A file that is
    found twice, in folders in each other or through a link, is returned once.
    """

    def is_ours(path: Path) -> bool:
        try:
            return SafetensorsFile.open(path).metadata.get(KEY, "").partition("-step")[0] == key != ""
        except FaceLoraError:
            return output is not None and path.with_stem(without_step(path)) == output

    return list({os.path.realpath(path): path for path in filter(is_ours, lora_files(folders))}.values())


def without_step(path: Path) -> str:
    """Return the stem of a LoRA's name, without what the names of intermediate LoRAs and their copies end with."""
    return re.sub(r"-step\d{6,}(-\d+)?$", "", path.stem)


def forget_run(key: str) -> None:
    """Delete the run's folder of a job, by its key: its state, samples, history and measured steps."""
    shutil.rmtree(RunFolder.of(key).path, ignore_errors=True)


def with_tensors(made: str | None, folders: Sequence[Path]) -> LoraFile | None:
    """Return the first LoRA in the folders whose tensors have that hash, under any name."""
    found = (path for path in lora_files(folders) if has_tensors(path, made)) if made else ()
    return next(map(LoraFile.read, found), None)


def has_tensors(path: Path, made: str) -> bool:
    """Return whether the file is a LoRA whose tensors have that hash. It is only read if its metadata has the hash too."""
    with suppress(FaceLoraError):
        return SafetensorsFile.open(path).metadata.get(MODEL_HASH) == made and LoraFile.read(path).model_hash == made
    return False


def lora_files(folders: Sequence[Path]) -> Iterator[Path]:
    """Yield the files in and below the folders that may be LoRAs. Links to folders are followed, as in ComfyUI."""
    for folder in folders:
        for parent, below, names in os.walk(folder, followlinks=True):
            below.sort()
            yield from (Path(parent, name) for name in sorted(names) if name.endswith((".safetensors", ".sft")))
