"""What conversion, merging, resizing and extraction share: the LoRA that they make, its rank, names and metadata."""

import re
from typing import NamedTuple

from ..errors import BadConfig, UnmatchedKeys
from ..tensor_names import PUBLISHED_BLOCKS, NameTable
from .file import KEY, LoraFile
from .metadata import MODELSPEC_VERSION

_OF_THE_ORIGINAL = re.compile(rf"lora_adapter_metadata|{re.escape(KEY)}")
"""The metadata that don't apply to a changed copy of a LoRA."""


class NewLora(NamedTuple):
    """A LoRA made from other LoRAs or from checkpoints, and its error compared with them."""

    lora: LoraFile
    error: float
    """The largest relative error of a module's change, by the Frobenius norm: 0 to 1."""


def check_rank(rank: int) -> None:
    """Raise BadConfig for a rank below 1."""
    if rank < 1:
        raise BadConfig(f"a rank must be at least 1, not {rank}")


def unambiguous_names(lora: LoraFile) -> NameTable:
    """Return the names of the modules of a LoRA's model in every scheme.

    Raises UnmatchedKeys for original names of a UNet with other numbers of blocks than the published models.
    """
    for entry in lora.entries if lora.table.has_other_blocks else ():
        numbered = re.match(r"(input|output)_blocks\.[1-9]", entry.place.fusion.original)
        if entry.part == "denoiser" and entry.place.index is None and numbered:
            raise UnmatchedKeys(
                f"{lora.name}: {entry.name} is ambiguous, because this UNet does not have {PUBLISHED_BLOCKS} residual blocks "
                f"per level like the published {lora.family} models. Export it again with diffusers' names"
            )
    return lora.table


def copied_metadata(lora: LoraFile) -> dict[str, str]:
    """Return the metadata of a LoRA that also apply to a changed copy of it."""
    return {key: value for key, value in lora.true_metadata.items() if not _OF_THE_ORIGINAL.fullmatch(key)}


def metadata_for(lora: LoraFile, scheme: str) -> dict[str, str]:
    """Return the metadata for the LoRA in a scheme, with the keys that it needs and without those of the old scheme."""
    metadata = lora.base_metadata
    known = {
        "modelspec.sai_model_spec": MODELSPEC_VERSION,
        "modelspec.architecture": f"{metadata['modelspec.architecture']}/lora",
    }
    ranks = {entry.rank for entry in lora.entries}
    if scheme == "kohya":
        is_lora = all(entry.kind in ("lora", "locon") for entry in lora.entries)
        known["ss_base_model_version"] = metadata["ss_base_model_version"]
        known["ss_network_module"] = "networks.lora" if is_lora else "lycoris.kohya"
        known["ss_network_dim"] = str(*ranks) if len(ranks) == 1 else "Dynamic"
    kept = copied_metadata(lora)
    dim = kept.get("ss_network_dim", "")
    if dim.isdecimal() and None not in ranks and dim not in map(str, ranks):
        # Fusing and splitting modules changes their ranks.
        kept = {key: value for key, value in kept.items() if key not in ("ss_network_dim", "ss_network_alpha")}
    return known | kept
