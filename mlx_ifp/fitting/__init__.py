"""A predictor in closed form: least squares from what the dense LLM computes, which stays frozen."""
