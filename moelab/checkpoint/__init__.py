"""From a model's name to the byte range of every expert on disk."""
