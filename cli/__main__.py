"""`python -m minigpt3d.cli`: the same as the installed command `minigpt3d`."""

import sys

from minigpt3d.cli.main import main


if __name__ == "__main__":
    sys.exit(main())
