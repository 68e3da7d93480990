"""Which nodes of a graph an execution provider runs, from facts that ship with satchel."""
