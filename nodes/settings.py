"""The inputs of both packs' nodes that set a training run or choose from a style pack: names, defaults, ranges and help."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

from ..core.config import RecipeName, TrainConfig, config_from, option, typed_settings
from ..core.models.recipe import Recipe
from ..core.pictures.style_pack import FoundPacks, StyledPrompt, Subject
from ..core.progress import OnWarning, silent
from ..core.training.recipes import ENOUGH, MEASUREMENTS, recipe_settings, steps_between


def _help(setting: str) -> str:
    return f"{TrainConfig.__dataclass_fields__[setting].metadata['help']}."


@dataclass(frozen=True)
class NodeSettings:
    """What a node's inputs set. A number at 0 leaves the value to the recipe, and `settings` overrides everything else."""

    trigger_word: str = option("sks", _help("trigger_word"))
    class_word: str = option("person", _help("class_word"))
    recipe: RecipeName = option(
        "balanced",
        "Preset for the training run: 'fast' for a first try, 'balanced' (default) for most people, 'best' for the longest "
        "training. With eight or more photos and the face networks, likeness is measured and the best step is kept. The help "
        "page lists the numbers.",
    )
    samples: int = option(
        4,
        f"How many times sample pictures are drawn during training. 0 draws none, or {MEASUREMENTS} if likeness is measured, "
        "which needs samples. Fewer samples save time.",
        0, 100,
    )  # fmt: skip
    steps: int = option(
        0,
        "Number of optimizer steps. 0 (default) uses the recipe's value. Raise it if the likeness is too weak.",
        0, 100_000,
    )  # fmt: skip
    rank: int = option(
        0,
        "Rank of the LoRA: a higher rank learns more detail and makes a larger file. 0 (default) uses the recipe's value.",
        0, 1024,
    )  # fmt: skip
    learning_rate: float = option(
        0.0,
        "Highest learning rate. 0 (default) uses the recipe's value. Lower it if samples become distorted.",
        0.0, 10.0,
    )  # fmt: skip
    resolution: int = option(
        0,
        "Training resolution: the side, in pixels, of a square with the picture's area. 0 (default) uses the recipe's value, "
        "or the base model's resolution if the recipe has none. Lower it to save memory.",
        0, 4096,
    )  # fmt: skip
    training_seed: int = option(
        1,
        "Random seed. The same inputs and seed give the same LoRA. Change it to get a different result.",
        0, 2**63 - 1,
    )  # fmt: skip
    sample_prompts: str = option(
        "",
        "Prompts for the sample pictures, one per line. If empty, samples use 'a photo of' and the trigger and class word.",
    )
    settings: str = option(
        "",
        "Any other training setting, as lines of TOML. Settings here override the recipe and the inputs above. The help page "
        "lists them all.",
    )

    @classmethod
    def read(cls, query: Mapping[str, str]) -> "NodeSettings":
        """Read the settings that an address has. Raises ValueError for a number that is not one."""
        kinds: dict[str, Callable[..., Any]] = {one.name: type(one.default) for one in fields(cls) if one.name in query}
        return cls(**{name: kind(query[name]) if query[name] else kind() for name, kind in kinds.items()})

    def config(
        self,
        recipes: Mapping[str, Recipe],
        photos: int = ENOUGH,
        others: Mapping[str, Any] | None = None,
        on_warning: OnWarning = silent,
    ) -> TrainConfig:
        """Return the settings of the recipe for a number of photos, overridden by the inputs, and those by `settings`.

        `others` are settings that other inputs decide. Raises BadConfig for a setting that is unknown or out of range.
        """
        numbers = {name: getattr(self, name) for name in ("steps", "rank", "learning_rate", "resolution")}
        given = {name: value for name, value in numbers.items() if value} | dict(others or {})
        given |= {"trigger_word": self.trigger_word, "class_word": self.class_word, "seed": self.training_seed}
        given |= typed_settings(self.settings)
        chosen = recipe_settings(self.recipe, recipes, given, photos, on_warning)
        if self.samples and "sample_every" not in given:
            chosen["sample_every"] = steps_between(chosen["steps"], self.samples)
        prompts = [line.strip() for line in self.sample_prompts.splitlines() if line.strip()]
        if prompts and chosen.get("sample_every"):
            chosen["sample_prompts"] = prompts
        return config_from(chosen)


@dataclass(frozen=True)
class NodeStyles:
    """What a node's inputs choose from a style pack."""

    pack: str = option(
        "corporate",
        "The style pack to draw from. Save your own packs in models/style_packs. They replace packs with the same id.",
    )
    styles: str = option("", "Names of styles in the pack, separated by commas. If empty, all styles are used.")
    count: int = option(8, "Number of pictures. They are divided evenly among the styles.", 1, 1000)
    first_seed: int = option(
        1,
        "Seed of the first picture. Each further picture adds 1. Change it for different pictures and variations.",
        0, 2**64 - 1,
    )  # fmt: skip
    resolution: int = option(
        0,
        "Picture size: the side, in pixels, of a square with the picture's area. 0 (default) uses the resolution of the model "
        "family.",
        0, 4096,
    )  # fmt: skip

    @property
    def names(self) -> list[str]:
        """The names of the styles; [] for all of the pack."""
        return [name.strip() for name in self.styles.split(",") if name.strip()]

    def prompts(self, packs: FoundPacks, phrase: str, family: str) -> list[StyledPrompt]:
        """Return the prompts for pictures of the person with that trigger phrase. Raises BadStylePack for an unknown style."""
        return packs.pick(self.pack).prompts(
            Subject(phrase, class_word=""), family, self.count, self.first_seed,
            styles=self.names or None, resolution=self.resolution or None,
        )  # fmt: skip
