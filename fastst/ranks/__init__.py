"""What ranks tell each other: frames, statistics, sums."""
