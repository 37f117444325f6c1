"""What was learned: scores with intervals, controls, maps, directions."""
