"""What PESO is compared with: one file and one row of methods.METHODS each, settings beside the code."""
