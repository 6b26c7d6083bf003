"""The small Ovis: its pictures, questions and tokenizer."""
