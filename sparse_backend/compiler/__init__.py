"""From a checkpoint to a compiled one: prune, choose formats, read and write safetensors."""
