"""`python -m plphp` is the `plphp` command."""

from plphp.cli import main

if __name__ == "__main__":
    main()
