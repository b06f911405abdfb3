"""Adapters, one file per engine; each imports its engine only when that engine calls it."""
