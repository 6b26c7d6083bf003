"""What serves a model to people: a page to talk to it."""
