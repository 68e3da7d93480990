"""Runs a bundle that is cut for several ranks, which are processes that MPI starts together."""
