"""`python -m relaxlm` is `relaxlm`."""

from relaxlm.cli.main import main

if __name__ == "__main__":
    main()
