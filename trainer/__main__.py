"""Entry for ``torchrun -m trainer``."""

from trainer.cli import main

main()
