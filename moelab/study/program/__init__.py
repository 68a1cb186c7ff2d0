"""The whole study of one model, as one command: `moelab study`. Frames, charts and a page."""
