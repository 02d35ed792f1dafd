"""The files of a training run: its output, and what is written beside it."""

import re
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

from PIL import Image

from ..config import TrainConfig
from ..device import PRECISIONS
from ..errors import BadConfig, BadFile, FaceLoraError
from ..models.base import Base
from ..storage.drawn import save_png
from ..storage.files import check_ending, check_writable, make_folder, remove_leftovers, set_aside
from ..storage.locks import locked
from ..storage.safetensors_file import SafetensorsFile
from .callbacks import Callbacks
from .job import TrainingJob
from .methods import METHODS, files_beside
from .methods.method import Trained

_NUMBERED = r"-step\d{6,}"
"""What the name of an intermediate LoRA adds to the output's, as a regular expression."""
_SAMPLE = r"step\d{6,}-\d+\.png"
"""The names of samples in their folder, as a regular expression."""
_WOULD_REPLACE = "which would replace it. Move it, or choose another output"


@dataclass(frozen=True)
class RunFiles:
    """The paths of the files that a training run writes, all named after its output."""

    output: Path
    """The trained file."""

    @property
    def state(self) -> Path:
        """The state of the run while it is unfinished: `NAME.state.safetensors`."""
        return self.output.with_name(f"{self.output.stem}.state.safetensors")

    @property
    def samples(self) -> Path:
        """The folder of the pictures drawn during training: `NAME-samples`."""
        return self.output.with_name(f"{self.output.stem}-samples")

    def at_step(self, step: int) -> Path:
        """The intermediate LoRA after that step: `NAME-step000100.safetensors`."""
        return self.beside(f"step{step:06d}")

    def beside(self, addition: str) -> Path:
        """Another file of the run: `NAME-ADDITION.safetensors`."""
        return self.output.with_name(f"{self.output.stem}-{addition}{self.output.suffix}")

    def intermediate(self) -> list[Path]:
        """Find the intermediate LoRAs of any run with this name."""
        return self._named(_NUMBERED)

    def check(self, base: Base) -> None:
        """Raise BadFile when the output cannot be written, or is a file of the base model."""
        check_ending(self.output, ".safetensors")
        check_writable(self.output)
        if any(self.output.exists() and self.output.samefile(file.path) for file in base.files):
            raise BadFile(
                f"{self.output}: is a file of the base model, which the LoRA would replace. Choose another output"
            )

    def delete_leftovers(self) -> None:
        """Delete temporary files of a killed run. Requires the output's lock."""
        names = rf"{re.escape(self.output.stem)}(\.state|-embedding|-lora|{_NUMBERED})?{re.escape(self.output.suffix)}"
        remove_leftovers(self.output.parent, names)
        if self.samples.is_dir():
            remove_leftovers(self.samples, _SAMPLE)

    def foreign(self, config: TrainConfig) -> str | None:
        """Describe a file that a run with these settings would replace although no run with this output made it; else None."""
        names = {_NUMBERED: "an intermediate LoRA of save_every"} if config.save_every else {}
        for addition in METHODS[config.method].extra_files:
            names[f"-{addition}"] = f"the {addition} that the method {config.method} writes"
        found = ((path, what) for addition, what in names.items() for path in self._named(addition))
        others = ((path, what) for path, what in found if not self._is_ours(path))
        return next((f"{path}: has the name of {what}, {_WOULD_REPLACE}" for path, what in others), None)

    def _named(self, addition: str) -> list[Path]:
        pattern = re.compile(rf"{re.escape(self.output.stem)}{addition}{re.escape(self.output.suffix)}")
        return [path for path in self.output.parent.iterdir() if pattern.fullmatch(path.name)]

    def _is_ours(self, path: Path) -> bool:
        return metadata_of(path).get("ss_output_name") == self.output.stem

    @contextmanager
    def held(self, job: TrainingJob, resume: bool = False, restart: bool = False) -> Iterator[None]:
        """Keep other runs from writing these files while the context is open. Temporary files of a killed run are deleted.

        Raises BadFile for an output that cannot be written or would replace what isn't from an earlier run, InUse while another
        run writes it, and BadConfig for a leftover state.
        """
        config = job.config
        self.check(job.base)
        check_writable(self.state)
        with locked(self.output):
            self.delete_leftovers()
            if self.state.exists() and not (resume or restart):
                raise BadConfig(
                    f"{self.state}: the state of an unfinished run, which a new run would replace. Continue it with "
                    "resume, start over with restart, or choose another output"
                )
            if problem := self.foreign(config):
                raise BadFile(problem)
            steps = range(config.save_every, config.steps + 1, config.save_every) if config.save_every else ()
            for path in self.intermediate():
                if path.resolve() in job.files_read() and int(path.stem.rpartition("-step")[2]) in steps:
                    raise BadFile(f"{path}: has the name of an intermediate LoRA of save_every, {_WOULD_REPLACE}")
            yield

    def set_earlier_aside(self, keep: Collection[Path]) -> None:
        """Move the intermediate LoRAs and samples of an earlier run into folders `earlier`, except those to `keep`."""
        loras = [path for path in self.intermediate() if self._is_ours(path)]
        samples = [path for path in self.samples.glob("step*.png") if re.fullmatch(_SAMPLE, path.name)]
        for path in [*loras, *samples]:
            if path.resolve() not in keep:
                set_aside(path)
        self.state.unlink(missing_ok=True)  # Otherwise `resume` would continue it if this run is killed.

    def written_by(self, callbacks: Callbacks, config: TrainConfig) -> Callbacks:
        """Replace missing callbacks with ones that write intermediate LoRAs and samples."""

        def save(step: int, lora: Trained) -> None:
            lora.save(self.at_step(step), PRECISIONS[config.save_precision])

        def save_samples(step: int, images: list[Image.Image]) -> None:
            folder = make_folder(self.samples)
            for index, image in enumerate(images):
                save_png(folder / f"step{step:06d}-{index}.png", image)

        return replace(callbacks, on_save=callbacks.on_save or save, on_sample=callbacks.on_sample or save_samples)

    def write(self, lora: Trained, job: TrainingJob) -> None:
        """Write the trained file and the files that belong beside it, and delete the state."""
        dtype = PRECISIONS[job.config.save_precision]
        for addition, other in files_beside(lora, job.base, job.config).items():
            other.save(self.beside(addition), dtype)
        lora.save(self.output, dtype)
        self.state.unlink(missing_ok=True)


def metadata_of(path: Path) -> Mapping[str, str]:
    """Return the metadata of a safetensors file. Empty if it cannot be read."""
    with suppress(FaceLoraError):
        return SafetensorsFile.open(path).metadata
    return {}
