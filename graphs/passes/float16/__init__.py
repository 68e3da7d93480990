"""Passes that store or compute in float16."""
