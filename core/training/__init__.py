"""From photos to a LoRA: encoding, the loop and its steps, methods, likeness, and what is kept of a run."""
