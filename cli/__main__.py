"""`python -m minigpt3d.cli`: the same as the installed command `minigpt3d`."""

import sys

from .main import main


if __name__ == "__main__":
    sys.exit(main())
