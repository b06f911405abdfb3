"""Diffs for engine versions that lack a hook; patching.py has the table, patches/README.md says when each can go."""
