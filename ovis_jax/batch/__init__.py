"""Answering files of requests with the engine."""
