"""The recipe of ovis-tiny: generated pictures and questions, tokenizer, training and model card."""
