"""Makes `python -m mmcache`, and so `torchrun -m mmcache`, the command `mmcache`."""

from mmcache.cli import main

main()
