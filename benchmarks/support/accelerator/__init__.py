"""The parts of `benchmarks.on_accelerator`; each runs in a process of its own."""
