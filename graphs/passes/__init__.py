"""The passes, grouped by stage; each module has one pass of its own name."""
