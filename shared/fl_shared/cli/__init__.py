"""What the five commands have in common: verbs, output, completion, missing packages, errors and exit codes."""
