"""Benchmarks: one script per question. Each prints a table and can write JSON."""
