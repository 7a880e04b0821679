"""`python -m diffmem`: the command line without the console script."""

from diffmem.cli import main

if __name__ == "__main__":
    main()
