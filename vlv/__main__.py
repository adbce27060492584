"""`python -m vlv`: the same as the command `vlv`."""

from vlv.cli.main import app

if __name__ == "__main__":
    app(prog_name="vlv")
