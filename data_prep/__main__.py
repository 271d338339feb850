"""`python -m data_prep` is `deberta-prep`."""

from data_prep.cli import main

if __name__ == "__main__":
    main()
