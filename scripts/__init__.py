"""Scripts to copy and edit; imported as package data, `design_lightning.scripts`."""
