"""Private data: tables read from disk, and the units that differential privacy protects."""
