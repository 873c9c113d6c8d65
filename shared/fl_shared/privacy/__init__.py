"""The differentially private mechanism and its accounting."""
