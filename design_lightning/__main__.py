"""`python -m design_lightning COMMAND`: what `design-train COMMAND` is, of the Python that runs it."""

from design_lightning.cli import main

if __name__ == "__main__":
    main()
