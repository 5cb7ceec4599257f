"""Trains a decode module: `python train/main.py --config configs/train/example.yaml [a.b=c ...]`."""

import sys

from pshare_jax.training.cli import main

if __name__ == "__main__":
    sys.exit(main())
