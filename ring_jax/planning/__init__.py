"""What the planner's stages cost and its roles hold: on a chip by formula, on this machine by what was measured."""
