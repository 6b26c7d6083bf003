"""Device side: pure functions of (params, arrays)."""
