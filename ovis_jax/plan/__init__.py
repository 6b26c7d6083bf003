"""Memory and latency estimates for a model on given devices, without needing the devices."""
