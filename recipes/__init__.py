"""How models were made, from nothing to a checkpoint folder."""
