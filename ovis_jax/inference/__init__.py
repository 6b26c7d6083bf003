"""Generation, sampling, scoring of given answers, and visual words."""
