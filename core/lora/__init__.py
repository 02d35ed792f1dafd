"""LoRA files: read, written, converted, merged, inspected, and applied to a network."""

from typing import TYPE_CHECKING

from ..lazy_names import lazy_names

if TYPE_CHECKING:
    from .blocks import BLOCK_LISTS as BLOCK_LISTS
    from .blocks import block_strengths as block_strengths
    from .checkpoints import extract_lora as extract_lora
    from .checkpoints import merge_into_checkpoint as merge_into_checkpoint
    from .convert import convert_lora as convert_lora
    from .convert import merge_loras as merge_loras
    from .convert import resize_lora as resize_lora
    from .embeddings import WORD_KEY as WORD_KEY
    from .embeddings import embedding_files as embedding_files
    from .embeddings import file_word as file_word
    from .embeddings import word_of as word_of
    from .file import Entry as Entry
    from .file import LoraFile as LoraFile
    from .file import fit as fit
    from .hashes import model_hash as model_hash
    from .inspect import edit_metadata as edit_metadata
    from .inspect import format_inspection as format_inspection
    from .inspect import format_line as format_line
    from .inspect import inspect_folder as inspect_folder
    from .inspect import inspect_lora as inspect_lora
    from .inspect import trigger_words as trigger_words
    from .inspect import verify_lora as verify_lora
    from .modules import LoraModule as LoraModule
    from .modules import name_kinds as name_kinds
else:
    __getattr__, __dir__, __all__ = lazy_names(
        __name__,
        {
            ".blocks": ("BLOCK_LISTS", "block_strengths"),
            ".checkpoints": ("extract_lora", "merge_into_checkpoint"),
            ".convert": ("convert_lora", "merge_loras", "resize_lora"),
            ".embeddings": ("WORD_KEY", "embedding_files", "file_word", "word_of"),
            ".file": ("Entry", "LoraFile", "fit"),
            ".hashes": ("model_hash",),
            ".inspect": (
                "edit_metadata",
                "format_inspection",
                "format_line",
                "inspect_folder",
                "inspect_lora",
                "trigger_words",
                "verify_lora",
            ),
            ".modules": ("LoraModule", "name_kinds"),
        },
    )
