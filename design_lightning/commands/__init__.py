"""The commands of `design-train`, one a file; each has `main(command, args)`."""
