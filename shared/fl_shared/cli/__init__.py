"""What the five commands have in common: parsers, output, completion, missing packages, errors and exit codes."""
