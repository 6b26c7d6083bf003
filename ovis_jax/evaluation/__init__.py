"""Accuracy: question files, exact match, published scores; models for lmms-eval, VLMEvalKit."""
