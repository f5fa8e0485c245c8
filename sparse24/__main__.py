"""`python -m sparse24`."""

import sys


def main() -> None:
    try:
        from .cli import main as run
    except ModuleNotFoundError as e:
        if e.name is None or e.name.startswith("sparse24"):
            raise
        print(
            f"error: the command line needs {e.name}; pip install 'sparse24[train]', or '.[train]' in a checkout",
            file=sys.stderr,
        )
        sys.exit(2)
    run()


if __name__ == "__main__":
    main()
