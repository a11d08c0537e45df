#!/usr/bin/env python3
"""Run the command line from a checkout: ``python cli.py extract …`` is ``tlpipe extract …``.

The commands, in the order in which they are usually needed:

    python cli.py demo                            see everything work on a small data set
    python cli.py extract data/flowers            images -> features, once
    python cli.py fit-head cache/flowers/…        features -> head
    python cli.py predict runs/… photo.jpg        head -> classes of new images
    python cli.py inspect PATH · ls · backbones   look around

The commands live in ``pipeline/commands/``, one file each.
"""

from pipeline.commands import main

if __name__ == "__main__":
    main()
