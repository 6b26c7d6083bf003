"""Device side: the model as pure functions of (params, arrays)."""
