"""What results are worth: metrics against the source and the prompt, benchmark importers, and tables."""
