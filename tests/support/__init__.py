"""What several tests share: tiny checkpoints and ways to damage them."""
