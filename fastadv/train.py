"""``torchrun --nproc-per-node 8 -m fastadv.train -c CONFIG``: ``fastadv train`` as a module, which torchrun can start."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
