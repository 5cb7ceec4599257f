"""Serves the tasks of a config: `python serve/main.py --config configs/serve/smollm2.yaml [a.b=c ...]`."""

import sys

from pshare_jax.server.cli import main

if __name__ == "__main__":
    sys.exit(main())
