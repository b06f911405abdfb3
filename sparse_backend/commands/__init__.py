"""Commands of `sparse-backend`, one file each; cli.py registers them."""
