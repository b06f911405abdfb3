"""Pruning a whole checkpoint: calibration on text, a sparsity per projection, SparseGPT by llm-compressor."""
