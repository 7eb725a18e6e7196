"""`python -m m3d.cli` is the `m3d` command; torchrun, deepspeed and srun start it by this name."""

import sys

from m3d.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
