"""LoRA files: read, written, converted, merged, inspected, and applied to a network."""
