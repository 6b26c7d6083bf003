"""Commands that convert checkpoints between the Hub layout and this library."""
