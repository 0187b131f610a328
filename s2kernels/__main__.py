"""python -m s2kernels: the command line."""

from s2kernels.cli import main

main()
