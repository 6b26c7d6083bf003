"""Converting checkpoints from the Hub's layout, and exporting them to it."""
