"""A predictor in closed form: least squares from what the LLM computes, which stays frozen."""
