"""Chat: conversations in the form of the checkpoint's own template."""
