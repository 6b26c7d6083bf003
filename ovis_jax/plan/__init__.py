"""Memory and latency estimates for a model on given devices, made without those devices."""
