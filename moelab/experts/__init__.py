"""The expert bank: C slots a layer, what sits in them, and how the rest comes from disk."""
