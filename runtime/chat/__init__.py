"""Chat: the checkpoint's own template, rendered under limits."""
