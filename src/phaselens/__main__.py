"""`python -m phaselens` runs the command line."""

from phaselens.cli import main

if __name__ == "__main__":
    main()
