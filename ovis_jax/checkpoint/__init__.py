"""Reading and writing checkpoint folders: safetensors files, Hub keys, parameters and adapters."""
