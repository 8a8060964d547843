"""Looking inside: the paper's pictures of features, attention and trajectories, for any model."""
