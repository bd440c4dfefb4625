"""The one way to generate: prompt -> sub-network -> tokens."""
