"""The identity of a training run: everything that its result depends on.

A run with the same identity need not be trained twice, and a saved state can only be resumed with the same identity.
"""

import dataclasses
import json
from collections.abc import Sequence
from typing import Any

from ..config import TrainConfig
from ..lora.hashes import model_hash
from .inputs import TrainingInputs
from .methods import peak_rate

_NO_EFFECT = (
    "state_interval",
    "gradient_checkpointing",
    "eight_bit_products",
    "memory_limit",
    "compile",
    "deterministic",
)
_WHEN_SAMPLED = ("sample_every", "sample_prompts")
_HOW_SAMPLED = ("sample_guidance", "sample_steps", "likeness_pictures")
_WHICH_IS_SAVED = ("save_every", "save_precision", "thumbnail", "keep", "stop_early")
# Every other setting affects the steps themselves.


def settings_of_the_file(config: TrainConfig) -> dict[str, Any]:
    """Return the settings that affect the trained files. Memory settings, and samples that are only displayed, don't."""
    samples_matter = config.hold_out or config.thumbnail
    return _settings_without(config, _NO_EFFECT + (() if samples_matter else _WHEN_SAMPLED + _HOW_SAMPLED))


def settings_of_the_steps(config: TrainConfig, measured: bool) -> dict[str, Any]:
    """Return the settings that cannot change on resume. With likeness `measured`, they include how samples are drawn."""
    changeable = _NO_EFFECT + _WHEN_SAMPLED + _WHICH_IS_SAVED
    return _settings_without(config, changeable + (() if measured else _HOW_SAMPLED))


def _settings_without(config: TrainConfig, names: tuple[str, ...]) -> dict[str, Any]:
    # The photos that pass a check are compared themselves, so the setting has its value without a check (False).
    settings = {**dataclasses.asdict(config), "learning_rate": peak_rate(config), "check_photos": False}
    # Asking for products in 8 bits rounds the weights.
    names = tuple(name for name in names if name != "eight_bit_products" or config.eight_bit_products != "on")
    return {name: value for name, value in settings.items() if name not in names}


def run_identity(inputs: TrainingInputs, face_networks: Sequence[str] = ()) -> dict[str, str]:
    """Describe the settings, photos and base model of a run, each as a text that is equal when they are equal.

    `face_networks` are the names of the networks that measure likeness, empty when it isn't measured.
    """
    config, base = inputs.config, inputs.base
    settings = settings_of_the_steps(config, measured=bool(face_networks))
    if face_networks:
        settings["face_network"] = ", ".join(face_networks)
        if base.speed_lora:
            settings["speed_lora"] = base.speed_lora_sha256
    settings["precision"] = str(inputs.dtype).removeprefix("torch.")
    if config.schedule == "constant":
        del settings["steps"]  # a constant rate doesn't depend on the number of steps, so a resumed run may have more
    if inputs.start is not None:
        settings["continue_from"] = model_hash(inputs.start.tensors)
    if inputs.adapter is not None:
        settings["training_adapter"] = inputs.adapter.digest
    fingerprint = base.fingerprint("denoiser") + base.prediction_type + str(base.zero_terminal_snr)
    return {"settings": json.dumps(settings, sort_keys=True), "photos": inputs.cache.digest, "base model": fingerprint}
