"""Reading and writing: whole files or none, safetensors, tensors read when they are used, the cache folder."""
