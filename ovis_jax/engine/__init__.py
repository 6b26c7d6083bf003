"""The inference engine: continuous batching of requests, without HTTP."""
