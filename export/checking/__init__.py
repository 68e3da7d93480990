"""Tells, before anything ships, which nodes of a bundle's graphs an execution provider takes, and which not and why."""
