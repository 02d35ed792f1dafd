"""Read, write, convert, merge, inspect and apply LoRA files."""

from typing import TYPE_CHECKING

from ..lazy_names import lazy_names

if TYPE_CHECKING:
    from .apply import AppliedLora as AppliedLora
    from .base_weights import BaseWeights as BaseWeights
    from .blocks import block_strengths as block_strengths
    from .checkpoints import extract_lora as extract_lora
    from .checkpoints import merge_into_checkpoint as merge_into_checkpoint
    from .convert import convert_for as convert_for
    from .convert import convert_lora as convert_lora
    from .embeddings import embedding_files as embedding_files
    from .embeddings import file_word as file_word
    from .file import LoraFile as LoraFile
    from .file import fit as fit
    from .hashes import model_hash as model_hash
    from .inspect import Fault as Fault
    from .inspect import inspect_lora as inspect_lora
    from .inspect import movement_of as movement_of
    from .inspect import verify_lora as verify_lora
    from .merge import merge_loras as merge_loras
    from .metadata import edit_metadata as edit_metadata
    from .modules import LoraModule as LoraModule
    from .names import Entry as Entry
    from .names import LoraHeader as LoraHeader
    from .names import word_of as word_of
    from .new_lora import NewLora as NewLora
    from .report import MOVEMENT_KEY as MOVEMENT_KEY
    from .report import doubt_of_movement as doubt_of_movement
    from .report import format_inspection as format_inspection
    from .report import format_line as format_line
    from .report import format_movement as format_movement
    from .report import inspect_files as inspect_files
    from .report import inspect_header as inspect_header
    from .resize import resize_lora as resize_lora
    from .sidecars import write_sidecars as write_sidecars
    from .stated import WORD_KEY as WORD_KEY
    from .stated import trigger_phrases as trigger_phrases
    from .stated import trigger_words as trigger_words
else:
    __getattr__, __dir__, __all__ = lazy_names(__name__, __file__)
