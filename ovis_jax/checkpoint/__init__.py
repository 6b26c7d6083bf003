"""Folders of safetensors files: their keys, faults and tensors; parameters read and written."""
