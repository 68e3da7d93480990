"""How the graphs of a bundle are run: a state and the steps that take it further, for each kind of graphs."""
