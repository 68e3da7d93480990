"""Devices and the execution providers that run graphs on them: options, memory, and what was placed where."""
