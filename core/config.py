"""The settings of a training run in groups, and all groups as one frozen value that checks itself.

Every field is declared with `option(default, help, low, high)`. The command line's options, ComfyUI's tooltips and help
pages, and the checks of values are all made from it.
"""

import dataclasses
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any, Literal, get_type_hints

from .errors import BadConfig, check_length
from .storage.plain_values import Range, parse_toml, read_value

Targets = Literal["attention", "transformer", "transformer+conv"]
Precision = Literal["auto", "fp32", "bf16", "fp16"]
SavePrecision = Literal["fp16", "bf16", "fp32"]
MethodName = Literal["dora", "dreambooth", "loha", "lokr", "lora", "oft", "pivotal", "textual-inversion"]
"""The training methods, which are in core/training/methods/."""
RecipeName = Literal["fast", "balanced", "best"]
"""The recipes: for a quick, normal or thorough training run."""


@dataclass(frozen=True)
class OptimizerKind:
    """What the program needs to know about an optimizer. It is built from this alone, with the rates and the weight decay."""

    made_by: str
    """Its class with the module, which is also the optimizer's name in a file's metadata, as sd-scripts writes it."""
    state_bytes: int
    """The bytes of state that it keeps per trained number."""
    arguments: Mapping[str, Any] = field(default_factory=dict)
    package: str | None = None
    """What to install with pip for it, if it isn't from a package that every training run needs."""
    finds_rate: bool = False
    """Whether it finds one learning rate for all parameters, so that the configured one is a factor on it."""


OPTIMIZERS = {
    "adamw": OptimizerKind("torch.optim.adamw.AdamW", 8, {"fused": True}),
    "adamw8bit": OptimizerKind("bitsandbytes.optim.adamw.AdamW8bit", 2, package="bitsandbytes"),
    # Adafactor keeps only a row and a column per matrix.
    "adafactor": OptimizerKind(
        "transformers.optimization.Adafactor",
        0,
        {"scale_parameter": False, "relative_step": False, "warmup_init": False},
    ),
    "prodigy": OptimizerKind(
        "prodigyopt.prodigy.Prodigy",
        16,
        {"safeguard_warmup": True, "use_bias_correction": True},
        package="prodigyopt",
        finds_rate=True,
    ),
}
"""The optimizers by the names in the settings. To add one, add a row, and its package to `optimizers` in pyproject.toml."""
if TYPE_CHECKING:
    OptimizerName = str
else:
    OptimizerName = Literal[tuple(OPTIMIZERS)]


def option(default: Any, text: str, low: float | None = None, high: float = math.inf) -> Any:
    """Return a dataclass field with its default, the sentence that explains it (unit included), and its range.

    `low` and `high` are the smallest and largest allowed value; for a table they limit each number in it.
    """
    metadata = {"help": text, "low": low, "high": high}
    if isinstance(default, dict):
        return field(default_factory=lambda: dict(default), metadata=metadata)
    return field(default=default, metadata=metadata)


class Settings:
    """A group of settings. `_check` is called when a TrainConfig is made, after types and ranges were checked."""

    def _check(self) -> None:
        """Raise BadConfig if two settings of the group contradict each other, or one requires another."""


@dataclass(frozen=True)
class PersonSettings(Settings):
    """The words that name the person."""

    trigger_word: str = option("sks", "Word that names the person in captions and prompts")
    class_word: str = option("person", "Noun for the person, such as person, woman or man")

    def _check(self) -> None:
        if not self.trigger_word.strip() or not self.class_word.strip():
            raise BadConfig("trigger_word and class_word must not be empty")


@dataclass(frozen=True)
class MethodSettings(Settings):
    """What is trained: the method, and the adapter's size and place."""

    method: MethodName = option("lora", "Training method")
    rank: int = option(16, "Rank of B·A: the size of the adapter. For oft, the most rows rotated together", 1, 4096)
    alpha: float | None = option(
        None, "Scale of the adapter: the weight change is alpha / rank · B·A (default: the rank)", 1e-6, 1e6
    )
    targets: Targets = option("transformer", "Layers that get an adapter. transformer is Kohya's default set")
    rank_pattern: dict[str, int] = option(
        {}, "Rank of modules with this part in their name (* any text, ^ beginning, $ end of the name)", 1
    )
    alpha_pattern: dict[str, float] = option(
        {}, "Alpha of modules with this part in their name, as for rank_pattern", 1e-6
    )
    dropout: float = option(0.0, "Fraction of the adapter's inputs that is dropped, 0 to 1", 0, 0.99)
    rslora: bool = option(
        False, "Scale by alpha / sqrt(rank) (arXiv:2312.03732). The alpha in the file is adjusted to match"
    )
    embedding_vectors: int = option(
        2, "Textual inversion and pivotal tuning: vectors of the trigger word in each text encoder", 1, 64
    )
    embedding_words: str | None = option(
        None, "Textual inversion and pivotal tuning: words that the trigger word starts from (default: the class word)"
    )
    lokr_factor: int = option(
        -1, "Size of LoKr's small matrix, if it divides the layer's size; -1: near its square root", -1, 4096
    )

    def alpha_for(self, rank: int) -> float:
        """Return the alpha of a module of that rank: the one in the settings, else the rank."""
        return float(rank if self.alpha is None else self.alpha)

    def _check(self) -> None:
        for name in ("rank_pattern", "alpha_pattern"):
            for pattern in getattr(self, name):
                if not _PATTERN.fullmatch(pattern):
                    raise BadConfig(
                        f"{name}: {pattern!r} is not a valid pattern: use a part of a module's name. * is any text, [01] one "
                        "of these characters, ^ the beginning and $ the end"
                    )


@dataclass(frozen=True)
class PhotoSettings(Settings):
    """Which photos are trained on, and how they are cut."""

    resolution: int | None = option(
        None,
        "Training resolution: side in pixels of a square with a bucket's area (default: the base model's)",
        16,
        8192,
    )
    more_resolutions: tuple[int, ...] = option(
        (), "Also train each photo at this resolution, such as 512 besides 1024", 16, 8192
    )
    upscale: bool = option(False, "Enlarge photos that are smaller than their bucket")
    check_photos: bool = option(
        True, "Leave out photos that the photo check rejects (facelora check). If off, train on all of them"
    )
    face_crops: bool | None = option(
        None, "Also train on close-ups of the face without other people (default: if faces are small)"
    )
    face_masks: bool = option(False, "Draw masks, so that the loss counts the person more than the background")
    flip: bool = option(False, "Also train on mirrored photos. This costs likeness, because faces are asymmetric")


@dataclass(frozen=True)
class OptimizerSettings(Settings):
    """How long training takes, and how the adapter changes in it."""

    steps: int = option(800, "Optimizer steps", 1, 10_000_000)
    batch_size: int = option(1, "Photos in a forward pass", 1, 1024)
    accumulation: int = option(1, "Forward passes in an optimizer step", 1, 1024)
    optimizer: OptimizerName = option("adamw", "Optimizer")
    learning_rate: float | None = option(
        None, "Peak learning rate of the denoiser (default: 1e-4 times what suits the method; with prodigy 1.0)", 0, 100
    )
    text_encoder_lr: float = option(0.0, "Learning rate of the text encoders' adapter; 0: they are not trained", 0, 100)
    embedding_lr: float = option(
        5e-3,
        "Peak learning rate of the trigger word's vectors. With prodigy, the rate of everything else is used",
        0,
        100,
    )
    lora_plus_ratio: float = option(1.0, "Learning rate of B divided by that of A (LoRA+, arXiv:2402.12354)", 1e-3, 1e3)
    weight_decay: float = option(0.01, "Decoupled weight decay", 0, 10)
    schedule: Literal["constant", "linear", "cosine"] = option(
        "constant", "How the learning rate changes during training"
    )
    warmup_steps: int = option(0, "Steps during which the learning rate rises from 0", 0, 10_000_000)
    max_grad_norm: float = option(1.0, "Largest norm of the gradient; 0: no limit", 0)
    ema_decay: float = option(
        0.0, "Save a running average of the adapter with this decay; 0: save the adapter itself", 0, 0.99999
    )

    @property
    def finds_rate(self) -> bool:
        """Whether the optimizer finds one learning rate for all parameters."""
        return OPTIMIZERS[self.optimizer].finds_rate

    @property
    def found_rate_factor(self) -> float:
        """The factor applied to the learning rate that the optimizer finds."""
        return 1.0 if self.learning_rate is None else self.learning_rate

    @property
    def embedding_rate(self) -> float:
        """The peak learning rate of a new word's token vectors."""
        return self.found_rate_factor if self.finds_rate else self.embedding_lr

    def _check(self) -> None:
        if self.warmup_steps >= self.steps:
            raise BadConfig(f"warmup_steps = {self.warmup_steps} must be less than steps = {self.steps}")
        if not self.finds_rate:
            return
        rate = self.found_rate_factor
        if rate < 0.1:
            raise BadConfig(
                f"learning_rate = {rate}: {self.optimizer} finds the rate automatically; leave it out, or set it to 1.0"
            )
        others = {self.text_encoder_lr} - {0, rate} | {self.embedding_lr} - {type(self).embedding_lr, rate}
        if others or self.lora_plus_ratio != 1:
            raise BadConfig(
                f"{self.optimizer} uses one rate for everything, here {rate:g}: leave out text_encoder_lr, embedding_lr and "
                "lora_plus_ratio, or set the first two to this rate"
            )


@dataclass(frozen=True)
class LossSettings(Settings):
    """What the loss is computed on, and its weights."""

    loss: Literal["mse", "huber"] = option("mse", "Loss between prediction and target")
    huber_delta: float = option(0.1, "Error at which the Huber loss turns from quadratic to linear", 1e-6, 1e3)
    min_snr_gamma: float = option(5.0, "Gamma of the min-SNR loss weighting (arXiv:2303.09556); 0: off", 0, 1e3)
    debiased: bool = option(False, "Weight the loss by 1 / sqrt(SNR) (arXiv:2310.08442) instead of min-SNR")
    noise_offset: float = option(0.0, "Strength of a random constant added to the noise of each channel", 0, 1)
    input_perturbation: float = option(0.0, "Extra noise on the model's input only (arXiv:2301.11706)", 0, 1)
    timestep_min: int = option(0, "Lowest timestep drawn, 0 to 999", 0, 999)
    timestep_max: int = option(999, "Highest timestep drawn, 0 to 999", 0, 999)
    timestep_bias: float = option(
        0.0, "Above 0, late (noisy) timesteps are drawn more often; below 0, early ones", -10, 10
    )
    timestep_sampling: Literal["auto", "uniform", "logit-normal"] = option(
        "auto", "How timesteps are drawn for rectified flows (FLUX.1 and later). auto is logit-normal"
    )
    timestep_shift: float | None = option(
        None,
        "How far the timesteps of rectified flows are shifted towards noise; 1: not at all (default: the "
        "family's, by picture size)",
        0.01,
        100,
    )
    caption_dropout: float = option(0.0, "Fraction of the photos whose caption is left out", 0, 1)
    background_weight: float = option(0.1, "Weight of the loss outside a photo's mask, 0 to 1", 0, 1)

    def _check(self) -> None:
        if self.timestep_min > self.timestep_max:
            raise BadConfig(f"timestep_min = {self.timestep_min} is above timestep_max = {self.timestep_max}")
        if self.debiased and self.min_snr_gamma and self.min_snr_gamma != type(self).min_snr_gamma:
            raise BadConfig("debiased and min_snr_gamma both weight the loss; set only one of them")


@dataclass(frozen=True)
class PriorSettings(Settings):
    """What keeps the class from turning into the person."""

    prior_loss_weight: float = option(1.0, "Weight of the loss on class images and of prior prediction", 0, 100)
    class_images: int = option(
        0, "Class images that the base model draws if you give none (prior preservation)", 0, 10_000
    )
    prior_prediction: float = option(
        0.0, "Fraction of the steps that hold the class caption to the frozen model's prediction", 0, 1
    )


@dataclass(frozen=True)
class BaseSettings(Settings):
    """How the base model is used."""

    clip_skip: int = option(
        1, "Layer of the text encoder to use: 1 is the last, 2 the second to last (SD1.x only)", 1, 4
    )
    prediction_type: Literal["auto", "epsilon", "v_prediction"] = option("auto", "What the base model predicts")
    allow_distilled: bool = option(
        False,
        "Train on a model that needs a training adapter (schnell, klein, Turbo, Qwen-Image 2.1) without one. Only if one "
        "is merged into it",
    )
    zero_terminal_snr: bool = option(False, "The base model was trained to zero terminal SNR (arXiv:2305.08891)")


@dataclass(frozen=True)
class MachineSettings(Settings):
    """How and where it is computed."""

    seed: int = option(1, "Seed of everything random", 0, 2**63 - 1)
    precision: Precision = option(
        "auto", "Precision of the frozen weights and the arithmetic. The adapter is always fp32"
    )
    gradient_checkpointing: Literal["auto", "on", "off"] = option(
        "auto", "Recompute activations to save memory. auto: as much as the memory plan needs"
    )
    eight_bit_products: Literal["auto", "on", "off"] = option(
        "auto",
        "Multiply in 8 bits. auto: where frozen weights have 8 bits, if your GPU is measured to be faster with it. "
        "on: always, rounding other weights",
    )
    compile: bool = option(
        False, "Compile the denoiser's blocks. Steps take less GPU time, but the first ones take minutes"
    )
    deterministic: bool = option(
        False,
        "Compute the same numbers each time on a GPU too, so that a resumed training run equals an uninterrupted "
        "one. Steps are slower",
    )
    memory_limit: float | None = option(
        None, "GiB that training may use (default: what is free on a GPU; no limit on a CPU)", 1e-3, 1e6
    )


@dataclass(frozen=True)
class LikenessSettings(Settings):
    """The pictures drawn while training, and what is measured on them."""

    sample_every: int = option(0, "Draw sample images every so many steps; 0: never", 0, 10_000_000)
    sample_prompts: tuple[str, ...] = option(
        (), "Prompts of the sample images (default: a photo of the trigger and class word)"
    )
    sample_guidance: float | None = option(
        None, "Guidance, the CFG scale, of the sample images (default: what suits the base model)", 0, 100
    )
    sample_steps: int | None = option(
        None,
        "Sampling steps of the sample images (default: 20, for rectified flows 25). A base model distilled to a few "
        "steps takes no more than those",
        1,
        1000,
    )
    thumbnail: bool = option(False, "Put the last sample image into the file's metadata")
    hold_out: int = option(
        0,
        "Reference photos, held out of training to measure likeness whenever samples are drawn; 0: not measured",
        0,
        1000,
    )
    likeness_pictures: int = option(
        8, "Pictures with the trigger word that likeness is measured on. Half as many are drawn without it", 1, 100
    )
    keep: Literal["best", "last"] = option(
        "best", "Which LoRA to write when likeness is measured: the best or the last"
    )
    stop_early: bool = option(False, "Stop when likeness no longer rises, or when the class turns into the person")

    def _check(self) -> None:
        if not self.sample_every and (self.sample_prompts or self.thumbnail or self.hold_out):
            raise BadConfig("sample_prompts, thumbnail and hold_out require samples: set sample_every")
        if not self.hold_out and self.stop_early:
            raise BadConfig("stop_early requires likeness, and so held-out photos: set hold_out")


@dataclass(frozen=True)
class OutputSettings(Settings):
    """What is saved, and how often."""

    save_precision: SavePrecision = option("fp16", "Precision of the tensors in the file")
    save_every: int = option(0, "Also save the LoRA every so many steps; 0: only at the end", 0, 10_000_000)
    state_interval: float = option(
        60.0, "Seconds between saved states. A killed training run resumes from the last one", 0, 1e9
    )


GROUPS: dict[str, type[Settings]] = {
    "person": PersonSettings,
    "method": MethodSettings,
    "photos": PhotoSettings,
    "optimizer": OptimizerSettings,
    "loss": LossSettings,
    "prior preservation": PriorSettings,
    "base": BaseSettings,
    "machine": MachineSettings,
    "samples and likeness": LikenessSettings,
    "output": OutputSettings,
}
"""The groups by the headings that they have in the command line's help."""


@dataclass(frozen=True)
class TrainConfig(
    OutputSettings,
    LikenessSettings,
    MachineSettings,
    BaseSettings,
    PriorSettings,
    LossSettings,
    OptimizerSettings,
    PhotoSettings,
    MethodSettings,
    PersonSettings,
):
    """All settings of a training run. With the photos and the base model they determine its result.

    A function that needs only one group takes that group, and is given the whole. Raises BadConfig for a value of the wrong
    type or out of range, and for settings that contradict each other.
    """

    # The bases are listed from the last group to the first, because a dataclass begins with the fields of its last base.

    def __post_init__(self) -> None:
        _check_values({item.name: getattr(self, item.name) for item in dataclasses.fields(self)})
        for group in GROUPS.values():
            group._check(self)
        if self.thumbnail and self.sample_every > self.steps:
            raise BadConfig(f"thumbnail: sample_every = {self.sample_every} draws no sample in {self.steps} steps")


def group_of(setting: str) -> str:
    """Return the heading of a setting's group."""
    return next(heading for heading, group in GROUPS.items() if setting in group.__annotations__)


def _check_values(settings: Mapping[str, Any]) -> None:
    hints = get_type_hints(TrainConfig)
    for item in dataclasses.fields(TrainConfig):
        if item.name in settings:
            value, rule = settings[item.name], Range(item.metadata["low"], item.metadata["high"])
            if isinstance(value, list):
                raise BadConfig(f"{item.name} = {value!r}: expected a tuple")
            read_value(item.name, value, hints[item.name], rule)
            for text in value if isinstance(value, tuple) else (value,):
                if isinstance(text, str):
                    check_length(item.name, text)


_PATTERN = re.compile(r"\^?([\w.*-]|\\\.|\[[\w-]+\])+\$?")


def name_matches(pattern: str, name: str) -> bool:
    """Return whether a pattern of `rank_pattern` or `alpha_pattern` matches the name of a module.

    `\\.` and `.*` still mean a dot and any text: patterns used to be regular expressions, which may never end.
    """
    text = pattern.replace(r"\.", ".").replace(".*", "*")
    start, end = "" if text.startswith("^") else "*", "" if text.endswith("$") else "*"
    return fnmatchcase(name, f"{start}{text.strip('^$')}{end}")


def typed_settings(text: str) -> dict[str, Any]:
    """The settings that a user typed into a node as lines of TOML. Raises BadConfig, which says how lines must look."""
    try:
        return parse_toml(text)
    except BadConfig as error:
        raise BadConfig(f"settings: {error}; each line is NAME = VALUE, text in quotes") from None


def config_from(settings: Mapping[str, Any]) -> TrainConfig:
    """Return a TrainConfig from plain settings, such as a TOML table.

    Raises BadConfig for an invalid value, and for an unknown name, with the nearest known ones in the message.
    """
    return TrainConfig(**known_settings(settings))


def known_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings by their names in TrainConfig, with _ for -.

    Raises BadConfig for unknown or repeated names, and for values of the wrong type or out of range.
    """
    import difflib

    if not isinstance(settings, Mapping):
        raise BadConfig(
            f"the settings are a {type(settings).__name__}: expected a mapping of those to change, such as {{'steps': 300}}"
        )
    known = [item.name for item in dataclasses.fields(TrainConfig)]
    cleaned: dict[str, Any] = {}
    for raw, value in settings.items():
        name = raw.replace("-", "_")
        if name not in known:
            near = difflib.get_close_matches(name, known, n=3, cutoff=0.5) or known
            raise BadConfig(f"unknown setting {raw[:80]!r}; did you mean {', '.join(near)}?")
        if name in cleaned:
            raise BadConfig(f"{name} is set twice, also as {name.replace('_', '-')}: remove one of them")
        cleaned[name] = tuple(value) if isinstance(value, list) else value
    _check_values(cleaned)
    return cleaned
