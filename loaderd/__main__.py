"""`python -m loaderd`: how a Feed starts its private daemon, whatever started the training."""

from loaderd.cli import main

main()
