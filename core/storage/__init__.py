"""Reading and writing: atomic files, safetensors, tensors that are read when they are used, and the cache folder."""
