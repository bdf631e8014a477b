"""`python -m vlmae COMMAND ...`, where the script `vlmae` is not on the path."""

from vlmae.cli.main import main

if __name__ == "__main__":
    main()
