"""The metadata of a trained LoRA: the `ss_*` keys that sd-scripts writes and those of the ModelSpec standard."""

import json
import random
import time
from collections import Counter
from typing import Any

import torch
from PIL import Image

from ..config import OPTIMIZERS, OptimizerSettings, TrainConfig
from ..lora.metadata import THUMBNAIL_SIDE, cover
from ..models.base import Base
from ..models.memory_plan import MemoryPlan
from ..models.objective import TIMESTEPS
from ..photos.captions import tag_counts
from ..storage.drawn import DRAWN, jpeg_url
from .encode import LatentCache
from .inputs import TrainingInputs
from .methods import peak_rate

_PRECISION_NAMES = {torch.float32: "no", torch.bfloat16: "bf16", torch.float16: "fp16"}
WEIGHTS_KEY = "facelora.frozen_weights"
"""The key for the precision of quantised frozen weights. Quantising them changes the LoRA a little."""
PRODUCTS_KEY = "facelora.products"
"""The key for the precision of products with frozen weights, if it is lower than that of the training run."""
_NOT_OURS: dict[str, Any] = {
    "ss_adaptive_noise_scale": None,
    "ss_caption_dropout_every_n_epochs": 0,
    "ss_caption_tag_dropout_rate": 0.0,
    "ss_color_aug": False,
    "ss_face_crop_aug_range": None,
    "ss_fp8_base": False,
    "ss_fp8_base_unet": False,
    "ss_full_fp16": False,
    "ss_ip_noise_gamma_random_strength": False,
    "ss_keep_tokens": 0,
    "ss_lowram": False,
    "ss_max_validation_steps": None,
    "ss_multires_noise_discount": 0.3,
    "ss_multires_noise_iterations": None,
    "ss_noise_offset_random_strength": False,
    "ss_num_validation_images": 0,
    "ss_random_crop": False,
    "ss_scale_weight_norms": None,
    "ss_shuffle_caption": False,
    "ss_training_comment": None,
    "ss_v2": False,
    "ss_validate_every_n_epochs": None,
    "ss_validate_every_n_steps": None,
    "ss_validation_seed": None,
    "ss_validation_split": 0.0,
}
"""Options of sd-scripts that don't exist here, with the values that sd-scripts writes when they are unused."""


def training_metadata(
    inputs: TrainingInputs,
    *,
    steps: int,
    started_at: float,
    plan: MemoryPlan,
    weights_quantised: bool,
    products_in_eight_bits: bool,
    thumbnail: Image.Image | None = None,
) -> dict[str, str]:
    """Build the metadata of the result after `steps` steps, as strings. Hashes of the tensors are added on saving.

    None is written as "None", as in sd-scripts. The trigger word is in `modelspec.trigger_phrase`, `ss_tag_frequency` and
    `ss_datasets`, since each reader looks in one of them. `started_at` is in seconds since the epoch.
    """
    cache, base, config, finished_at = inputs.cache, inputs.base, inputs.config, time.time()
    values = _modelspec(base, config, finished_at, thumbnail) | _NOT_OURS | _of_photos(cache, base, config)
    values |= _of_length(cache, config, steps) | _of_settings(base, config)
    values |= {
        "ss_base_model_version": base.family.base_model_version,
        "ss_gradient_checkpointing": plan.selective or plan.recompute > 0,
        "ss_max_token_length": None if cache.chunks == 1 else 75 * cache.chunks,
        "ss_mixed_precision": _PRECISION_NAMES[inputs.dtype],
        "ss_new_sd_model_hash": base.sha256,
        "ss_sd_model_hash": base.legacy_hash,
        "ss_sd_model_name": base.name,
        "ss_session_id": random.Random(started_at).randrange(2**32),
        "ss_training_finished_at": finished_at,
        "ss_training_started_at": started_at,
        "ss_zero_terminal_snr": base.zero_terminal_snr,
    }
    if weights_quantised:
        values[WEIGHTS_KEY] = "8 bits"
    if products_in_eight_bits:
        values[PRODUCTS_KEY] = "8 bits"
    # For None, sd-scripts omits the keys of modelspec and network arguments, and writes "None" for all other keys.
    return {
        name: json.dumps(value) if isinstance(value, dict | list) else str(value)
        for name, value in values.items()
        if value is not None or not name.startswith(("modelspec.", "ss_network_args"))
    }


def _modelspec(base: Base, config: TrainConfig, finished_at: float, thumbnail: Image.Image | None) -> dict[str, Any]:
    phrase, resolution = f"{config.trigger_word} {config.class_word}", config.resolution or base.resolution
    limits = (config.timestep_min, config.timestep_max)
    return {
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": f"{base.family.architecture}/lora",
        "modelspec.implementation": "diffusers",
        "modelspec.implementation_version": "comfyui-facelora",
        "modelspec.title": phrase,
        "modelspec.resolution": f"{resolution}x{resolution}",
        "modelspec.date": time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(finished_at)),
        "modelspec.prediction_type": {"epsilon": "epsilon", "v_prediction": "v", "flow": None}[base.prediction_type],
        "modelspec.trigger_phrase": phrase,
        "modelspec.timestep_range": None if limits == (0, TIMESTEPS - 1) else f"{limits[0]},{limits[1] + 1}",
        "modelspec.encoder_layer": config.clip_skip if config.clip_skip > 1 else None,
        **(cover(jpeg_url(thumbnail, THUMBNAIL_SIDE, DRAWN)) if thumbnail else {}),
    }


def _of_photos(cache: LatentCache, base: Base, config: TrainConfig) -> dict[str, Any]:
    phrase, resolution = f"{config.trigger_word} {config.class_word}", config.resolution or base.resolution
    pictures = [image for image in cache.images if not image.is_class]
    class_count = len(cache.images) - len(pictures)
    pixels = base.latent_shape.pixels
    sizes = Counter(
        (image.mean.shape[2] * pixels, image.mean.shape[1] * pixels)
        for image in cache.images
        for _ in range(image.repeats)
    )
    # A folder name in Kohya's form, made from the settings because users' folder names must not get into the file.
    repeats = max((image.repeats for image in pictures), default=1)
    folder, class_folder = f"{repeats}_{phrase}", f"1_{config.class_word}"
    # Lora-Manager reads only the tags of the first folder, so the trigger phrase must be among them.
    tags = {phrase: len(pictures)} | tag_counts(image.caption for image in pictures)
    buckets = {
        "buckets": {
            str(index): {"resolution": list(size), "count": count} for index, (size, count) in enumerate(sizes.items())
        },
        "mean_img_ar_error": 0.0,
    }
    subset = {
        "img_count": len(pictures),
        "num_repeats": repeats,
        "color_aug": False,
        "flip_aug": config.flip,
        "random_crop": False,
        "shuffle_caption": False,
        "keep_tokens": 0,
        "caption_dropout_rate": config.caption_dropout,
        "image_dir": folder,
        "class_tokens": phrase,
        "is_reg": False,
    }
    dataset = {
        "is_dreambooth": True,
        "batch_size_per_device": config.batch_size,
        "num_train_images": len(pictures),
        "num_reg_images": class_count,
        "resolution": [resolution, resolution],
        "enable_bucket": True,
        "bucket_no_upscale": not config.upscale,
        "bucket_info": buckets,
        "tag_frequency": {folder: tags},
        "subsets": [subset],
    }
    class_folders = {class_folder: {"n_repeats": 1, "img_count": class_count}} if class_count else {}
    return {
        "ss_bucket_info": buckets,
        "ss_bucket_no_upscale": not config.upscale,
        "ss_cache_latents": True,
        "ss_dataset_dirs": {folder: {"n_repeats": repeats, "img_count": len(pictures)}},
        "ss_datasets": [dataset],
        "ss_enable_bucket": True,
        "ss_flip_aug": config.flip,
        "ss_max_bucket_reso": max((max(size) for size in sizes), default=None),
        "ss_min_bucket_reso": min((min(size) for size in sizes), default=None),
        "ss_num_reg_images": class_count,
        "ss_reg_dataset_dirs": class_folders,
        "ss_resize_interpolation": "lanczos",
        "ss_resolution": f"({resolution}, {resolution})",
        "ss_tag_frequency": {folder: tags},
    }


def _of_length(cache: LatentCache, config: OptimizerSettings, steps: int) -> dict[str, Any]:
    seen = sum(image.repeats for image in cache.images if not image.is_class)
    batches = -(-seen // config.batch_size)
    return {
        "ss_batch_size_per_device": config.batch_size,
        "ss_epoch": -(-steps * config.accumulation // max(1, batches)),
        "ss_gradient_accumulation_steps": config.accumulation,
        "ss_max_train_steps": config.steps,
        "ss_num_batches_per_epoch": batches,
        "ss_num_epochs": -(-config.steps * config.accumulation // max(1, batches)),
        "ss_num_train_images": seen,
        "ss_steps": steps,
        "ss_total_batch_size": config.batch_size * config.accumulation,
    }


def _of_settings(base: Base, config: TrainConfig) -> dict[str, Any]:
    flow, alpha = base.prediction_type == "flow", config.alpha_for(config.rank)
    conv = {"conv_dim": str(config.rank), "conv_alpha": str(alpha)}
    values = {
        "ss_caption_dropout_rate": config.caption_dropout,
        "ss_clip_skip": config.clip_skip if config.clip_skip > 1 else None,
        "ss_debiased_estimation": config.debiased,
        "ss_huber_c": config.huber_delta,
        "ss_huber_scale": 1.0,
        "ss_huber_schedule": "constant",
        "ss_ip_noise_gamma": config.input_perturbation or None,
        "ss_learning_rate": peak_rate(config),
        "ss_loss_type": "l2" if config.loss == "mse" else "huber",
        "ss_lr_scheduler": config.schedule,
        "ss_lr_warmup_steps": config.warmup_steps,
        "ss_max_grad_norm": config.max_grad_norm,
        "ss_min_snr_gamma": None if config.debiased or flow else config.min_snr_gamma or None,
        "ss_network_alpha": alpha,
        "ss_network_args": conv if config.targets == "transformer+conv" else None,
        "ss_network_dim": config.rank,
        "ss_network_dropout": config.dropout or None,
        "ss_network_module": "networks.lora",
        "ss_noise_offset": config.noise_offset or None,
        "ss_optimizer": OPTIMIZERS[config.optimizer].made_by,
        "ss_prior_loss_weight": config.prior_loss_weight,
        "ss_seed": config.seed,
        "ss_text_encoder_lr": config.text_encoder_lr or None,
        "ss_unet_lr": peak_rate(config),
    }
    if flow:
        values |= {
            "ss_model_prediction_type": "raw",
            "ss_timestep_sampling": "uniform" if config.timestep_sampling == "uniform" else "shift",
            "ss_discrete_flow_shift": config.timestep_shift,
        }
    return values
