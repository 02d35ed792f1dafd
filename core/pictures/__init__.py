"""Pictures from a base model and LoRAs: drawing, style packs, batches of headshots, and the pages that show them."""
