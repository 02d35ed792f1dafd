"""Base models: what a checkpoint is, its networks and text, how a prediction is made, and plans for the memory there is."""
