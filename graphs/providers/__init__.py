"""Predicts which nodes of a graph an execution provider runs, from tables that ship with satchel."""
