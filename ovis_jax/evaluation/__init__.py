"""Evaluation: exact match on question files, published scores, and models for other harnesses."""
