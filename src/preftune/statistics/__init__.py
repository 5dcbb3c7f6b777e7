"""Win rate, intervals, length control and power: numpy and scipy only."""
