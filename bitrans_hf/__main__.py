"""`python -m bitrans_hf` is the command `bitrans`."""

from .cli import main

if __name__ == "__main__":
    main()
