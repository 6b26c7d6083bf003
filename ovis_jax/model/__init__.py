"""The model, which runs on the device: pure functions of parameters and arrays."""
