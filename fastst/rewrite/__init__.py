"""What is done to models that somebody else wrote."""
