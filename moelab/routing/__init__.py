"""What the router did: recorded per token, kept compactly, read as tidy frames."""
