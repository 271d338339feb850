"""`python tests/benchmarks/prep.py`: data preparation's benchmark, as `run.py prep` runs it."""

import sys

from run import main  # pyright: ignore[reportMissingImports]  # started by its path

if __name__ == "__main__":
    sys.exit(main(["prep", *sys.argv[1:]]))
