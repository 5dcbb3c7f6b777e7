"""Training jobs of other systems as recipes: one file and one table for each system."""
