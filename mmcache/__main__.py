"""`python -m mmcache`, and so `torchrun -m mmcache`, is the command `mmcache`."""

from mmcache.cli import main

main()
