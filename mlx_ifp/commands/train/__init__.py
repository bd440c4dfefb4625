"""``mlx_ifp.train``."""
