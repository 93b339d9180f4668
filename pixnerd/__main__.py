"""`python -m pixnerd` runs the command `pixnerd`."""

from .cli import main

if __name__ == "__main__":
    main()
