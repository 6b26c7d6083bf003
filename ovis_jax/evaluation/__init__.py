"""How well a model answers: questions in files, published figures, plug-ins for two harnesses."""
