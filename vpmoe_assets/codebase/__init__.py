"""What code a step is: one reading of the sources, import closures, and the packages that decide bytes."""
